"""A JSON file per run, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import storage
from duc_dlc_jax.ablate import claims
from duc_dlc_jax.ablate.grid import Grid, Run
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import weights as weights_files

# Where the data lie, how they are fed and what else is written: not part of what a run is.
CIRCUMSTANCES = ("data.dir", "data.workers", "data.threads", "data.prefetch", "data.in_memory")
CIRCUMSTANCES += ("data.staging_dir", "init.weights", "train.checkpoint_every", "train.log_every")
CIRCUMSTANCES += ("train.keep_latest", "train.keep_best", "eval.pictures", "profile")


def budget(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the runs of one table share, but for what their variants change, by field.

    Of `init.weights` whether there are any: the file's place is a circumstance, its content is
    compared by `weights_digest`.
    """
    found = dict(config_lib.fields(config))
    weights = {"init.weights": "a file" if found["init.weights"] else ""}
    return {n: v for n, v in found.items() if n not in CIRCUMSTANCES} | weights


def weights_digest(name: str, source: str) -> str:
    """SHA-256 of the file that `init.weights` and `init.source` stand for; empty: no weights.

    Raises ConfigError as `weights.find`, and FileNotFoundError.
    """
    return storage.sha256(weights_files.find(name, source)[0]) if name else ""


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a run puts what it has beside its JSON; None: nowhere.

    unfinished: a workdir with the checkpoints from which a run that was cut off goes on. masks: a
    PNG with its labels of the grid's crops. weights: an .npz with its final network.
    """

    unfinished: Path | None = None
    masks: Path | None = None
    weights: Path | None = None


class Results:
    """The files of a workdir.

    `runs/NAME.json` of ended runs, `runs/NAME.failed` of failed ones, `grid.json`: all variants;
    the folders of `Files`, `crops/label.png` beside their masks; and `claims/` of the runs in work.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.folder = Path(workdir) / "runs"
        self.claims = claims.Claims(Path(workdir) / "claims")

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def files(self, run: Run, weights: bool = False) -> Files:
        home = self.folder.parent
        return Files(
            self._unfinished(run),
            self.masks(run.name),
            home / "weights" / f"{run.name}.npz" if weights else None,
        )

    def masks(self, name: str) -> Path:
        """The PNG with a run's labels of the grid's crops, or with the data set's: "label"."""
        return self.folder.parent / "crops" / f"{name}.png"

    def begun(self, run: Run) -> bool:
        """Whether it was cut off and goes on from a checkpoint."""
        return any((self._unfinished(run) / "checkpoints").glob("[0-9]*"))

    def claimed(
        self, runs: Sequence[Run], tried: Collection[str], current: str
    ) -> contextlib.AbstractContextManager[Run | None]:
        """The next run, claimed until the end of the block; None where there is none for now.

        tried: names of those not to take. current: the variant whose programs the process has.
        Runs that failed, before or in another process, come last.
        """

        def take(held: Collection[str]) -> Run | None:
            # After `held` was read: a run that has ended since then is seen as held or as done.
            left = [run for run in self.left(runs) if run.name not in tried]
            fresh = [run for run in left if not self.failure(run)]
            return claims.choose(fresh, held, current) or claims.choose(left, held, current)

        return self.claims.claimed(take)

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """Those that have not ended."""
        return [run for run in runs if not self.path(run).exists()]

    def _unfinished(self, run: Run) -> Path:
        return self.folder.parent / "unfinished" / run.name

    def done(self, run: Run) -> dict[str, Any] | None:
        """What the run wrote when it ended."""
        path = self.path(run)
        return _read(path) if path.exists() else None

    def failure(self, run: Run) -> str:
        """Why the run failed; empty if it did not."""
        path = self.path(run).with_suffix(".failed")
        return path.read_text().strip() if path.exists() and not self.path(run).exists() else ""

    def write(self, run: Run, result: dict[str, Any]) -> None:
        storage.write_whole(self.path(run), json.dumps(result, indent=1) + "\n")
        self.clear([run])

    def clear(self, runs: Sequence[Run]) -> None:
        """Removes what ended runs need no more; processes that were killed just then left it."""
        for run in runs:
            if self.path(run).exists():
                self.path(run).with_suffix(".failed").unlink(missing_ok=True)
                shutil.rmtree(self._unfinished(run), ignore_errors=True)

    def write_failure(self, run: Run, error: Exception) -> None:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        storage.write_whole(self.path(run).with_suffix(".failed"), text + "\n")

    def failures(self) -> dict[str, str]:
        """Runs that failed and did not end since, and why."""
        paths = sorted(self.folder.glob("*.failed"))
        return {p.stem: p.read_text().strip() for p in paths if not p.with_suffix(".json").exists()}

    def write_grid(self, grid: Grid) -> None:
        """Raises ConfigError where the workdir is another grid's, and leaves it as it was."""
        grid.check(result["variant"] for result in self.all())
        storage.write_whole(self.folder.parent / "grid.json", grid.to_json() + "\n")

    def grid(self) -> Grid:
        """Raises FileNotFoundError where nothing was run in the workdir."""
        path = self.folder.parent / "grid.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent} is not the workdir of an ablation: no grid.json"
            )
        return Grid.from_json(path.read_text())

    def all(self) -> list[dict[str, Any]]:
        """Every ended run in the folder."""
        return [_read(path) for path in sorted(self.folder.glob("*.json"))]

    def check(self, run: Run, config: ml_collections.ConfigDict, digest: str = "") -> None:
        """Raises ConfigError where a run was made, or begun, with another configuration than now.

        Rows of one table have one budget: seeds of two recipes do not mix.
        digest: of the initial weights as they are now; empty: unknown, or none.
        """
        path, old, known = self._unfinished(run), "", ""
        if self.begun(run):
            with contextlib.suppress(FileNotFoundError):  # another process has just ended it
                old = (path / "config.json").read_text()
        if (ended := self.done(run)) is not None:
            path, old = self.path(run), json.dumps(ended["config"])
            known = ended.get("weights_sha256", "")
        if not old:
            return
        then, now = budget(config_lib.from_json(old)), budget(config)
        changed = [f"{n}={then[n]!r} (now {now[n]!r})" for n in now if then[n] != now[n]]
        if not changed and known and digest and known != digest:
            changed = [f"init.weights of SHA-256 {known[:8]} (now {digest[:8]})"]
        if changed:
            raise ConfigError(
                f"{path} was run with {', '.join(changed)}; set it so again, remove it, or use "
                "another --workdir"
            )


def _read(path: Path) -> dict[str, Any]:
    """A run's file; raises ConfigError where it is cut off, as a broken copy is."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is no whole run: {error}. Copy it again, or remove it and the run is done anew"
        ) from error
