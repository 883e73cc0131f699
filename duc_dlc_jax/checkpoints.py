"""Orbax checkpoints: train state, position in the data and configuration, saved asynchronously."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint import options as orbax_options

from duc_dlc_jax import s3_arrays, storage
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.errors import CheckpointError, Stopped
from duc_dlc_jax.sharding import shapes
from duc_dlc_jax.train_step import TrainState

s3_arrays.enable()

SCORE = "final_score"
COMPLETE = "commit_success.txt"  # Orbax writes it last, on a disk too
PATIENCE = 30.0  # seconds for the saves of a process that ends by an error
UNREADABLE = "unreadable"  # folder of the workdir for checkpoints that are damaged


def _score(metrics: dict[str, float]) -> float:
    value = metrics.get(SCORE, math.nan)
    return -math.inf if math.isnan(value) else value


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves it to the loop to ask whether to stop.

    It would ask at points of its own, and processes agree on a point by counting the asking.

    With several processes it does not wait for the others, at barriers of minutes, where this one
    could not write its part of a save: `wait_until_finished` raises at once.
    """

    _failure: Exception | None = None

    def reached_preemption(self, step: int) -> bool:
        del step
        return False

    def wait_until_finished(self) -> None:
        while jax.process_count() > 1 and self.is_saving_in_progress():
            if self._failure:
                raise self._failure
            time.sleep(0.02)
        super().wait_until_finished()

    def _wait_for_checkpointers(self) -> None:
        with self._noting_failure():
            super()._wait_for_checkpointers()

    def _finalize_checkpoint(self, step: int) -> Any:
        with self._noting_failure():
            return super()._finalize_checkpoint(step)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = error
            raise


class Checkpoints:
    """The checkpoints below `workdir/checkpoints`, by step.

    Kept: the latest `keep_latest` and, of those saved with scores, the best `keep_best` by Final
    Score. (Orbax's `max_to_keep` with `best_fn` would delete the newest while scores fall.)

    Each holds a checksum per array, so that a bit that flips on a disk or on the way is noticed.
    On a disk a checkpoint gets its name when it is complete; in an object store, which cannot
    rename, it is one once it holds `COMPLETE`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep_latest: int = 2,
        keep_best: int = 1,
        training: bool = False,
    ):
        """training: this is the one run that saves here; what a killed save left is removed."""
        self._training, self._failed = training, False
        self.directory = storage.absolute(storage.path(workdir)) / "checkpoints"
        self._open = functools.partial(self._manager_of, keep_latest, keep_best)
        self._set_aside(self._with_bad_scores())
        self._manager = self._open()

    def _manager_of(self, keep_latest: int, keep_best: int) -> ocp.CheckpointManager:
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(max(keep_latest, 1)),
                checkpoint_managers.BestN(
                    get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        modes = orbax_options.AtomicityMode
        remote = storage.is_remote(self.directory)
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_score,
                best_mode="max",
                cleanup_tmp_directories=self._training,
                atomicity_options=orbax_options.AtomicityOptions(
                    mode=modes.COMMIT_FILE if remote else modes.AUTO
                ),
            ),
            item_names=("state", "data", "config"),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, ascending."""
        return sorted(self._manager.all_steps())

    def named_step(self, name: str) -> int:
        """The step of "best", "latest" or a number ("1000").

        Raises ConfigError for another name and FileNotFoundError without checkpoints.
        """
        named = {"best": self.best_step, "latest": self.latest_step}
        if name not in named and not name.isdigit():
            raise ConfigError(f"checkpoint {name!r}; allowed: best, latest, a step")
        step = named[name]() if name in named else int(name)
        if step is None:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint yet")
        return step

    def scores(self, step: int) -> dict[str, float]:
        """Those saved with the checkpoint; none where it was not evaluated."""
        return dict(self._manager.metrics(step) or {})

    def position(self, step: int) -> int:
        """Training images consumed until the checkpoint."""
        return self._data(step)["position"]

    def notes(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self._data(step)["notes"]

    def _data(self, step: int) -> dict[str, Any]:
        data = ocp.args.Composite(data=ocp.args.JsonRestore())
        return self._manager.restore(step, args=data)["data"]

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest Final Score; the latest where none was evaluated."""
        scored = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scored = {step: _score(m) for step, m in scored.items() if m and SCORE in m}
        return max(scored, key=lambda s: (scored[s], s)) if scored else self.latest_step()

    def has_scores(self, step: int) -> bool:
        return SCORE in (self._manager.metrics(step) or {})

    def save(
        self,
        state: TrainState,
        position: int,
        config: ml_collections.ConfigDict,
        metrics: dict[str, float] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Saves at `state.step`. position: training images consumed, over all epochs and hosts.

        notes: JSON that `notes` reads back. A checkpoint of the same step is replaced.

        Raises CheckpointError where this or the save before it cannot be written.
        """
        step = int(state.step)
        data = {"position": position, "checksums": checksums(state), "notes": notes or {}}
        try:
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(config.to_dict()),
                ),
                metrics=metrics or {},
                force=True,
            )
        except storage.errors() as error:
            raise self._save_error(error) from error

    def _save_error(self, error: Exception) -> CheckpointError:
        self._failed = True
        where, mend = str(self.directory), "mend what it says"
        if not storage.is_remote(where):
            free = shutil.disk_usage(self.directory).free
            where, mend = f"{where} ({free / 2**20:,.0f} MiB free)", "make room"
        return CheckpointError(
            f"a checkpoint cannot be written to {where}: {str(error)[:500]}. Those of earlier "
            f"steps are kept: {mend}, and the same command goes on from the latest"
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, int]:
        """The state saved at `step`, placed as `like` (ShapeDtypeStructs), and the position.

        Raises FileNotFoundError for a step that is not there, ConfigError for another structure and
        CheckpointError for one that is damaged.
        """
        self._check(step, like)
        restored = self._read(step, state=ocp.args.StandardRestore(like))
        return restored["state"], restored["data"]["position"]

    def restore_latest(self, like: TrainState) -> tuple[TrainState, int] | None:
        """The newest readable checkpoint, as from `restore`; None where there is none at all.

        Damaged ones are moved to the workdir's folder `unreadable` with a warning that names them.
        Raises ConfigError for another structure, and CheckpointError where all are damaged.
        """
        damaged = []
        while (step := self.latest_step()) is not None:
            try:
                result, failure = self.restore(step, like), None
            except CheckpointError as error:
                result, failure = None, error
            if not _any_process(failure is not None):
                return result
            damaged.append(str(failure or f"step {step}: another process could not read it"))
            self._manager.close()
            self._set_aside([step])
            self._manager = self._open()
        if damaged:
            raise CheckpointError(
                f"no checkpoint of the run can be read: {'; '.join(damaged)}. They are now in "
                f"{self.directory.parent / UNREADABLE}; to start anew take another workdir"
            )
        return None

    def _read(self, step: int, **items) -> Any:
        """The items and `data` of a step, their checksums compared; raises CheckpointError."""
        try:
            args = ocp.args.Composite(data=ocp.args.JsonRestore(), **items)
            restored = self._manager.restore(step, args=args)
            saved = restored["data"].get("checksums", {})
            restored["data"]["position"]
        except FileNotFoundError as error:
            raise self._damaged(step, error) from error
        except (OSError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # a disk that does not answer, a device that is full: no fault of the files
        except Exception as error:  # Orbax has bare ones for data that do not decode
            if storage.is_remote(self.directory) and storage.is_trouble(error):
                raise
            raise self._damaged(step, error) from error
        found = checksums(restored["state"]) if saved else {}
        wrong = [name for name in saved if found.get(name) != saved[name]]
        if wrong:
            raise self._damaged(step, f"{wrong[0]} is not what was saved, {len(wrong)} in all")
        return restored

    def _damaged(self, step: int, why: Any) -> CheckpointError:
        text = f"checkpoint {self.directory / str(step)} is damaged: {str(why)[:300]}"
        return CheckpointError(text)

    def _with_bad_scores(self) -> list[int]:
        """Steps whose scores are not JSON: Orbax cannot even list the others beside them."""
        bad = []
        for folder in self.directory.glob("[0-9]*"):
            path = folder / "metrics" / "metrics"
            if folder.name.isdigit() and path.is_file():
                try:
                    json.loads(path.read_text())
                except FileNotFoundError:
                    continue  # another process has moved it
                except ValueError as error:
                    step = int(folder.name)
                    if not self._training:
                        raise self._damaged(step, f"{path}: {error}") from error
                    bad.append(step)
        return bad

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Moves damaged checkpoints out of the way."""
        for step in steps:
            target = self.directory.parent / UNREADABLE / str(step)
            logging.warning(
                "checkpoint %s is damaged and moved to %s", self.directory / str(step), target
            )
            if jax.process_index() == 0:
                target.rmtree(missing_ok=True)
                storage.move(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are moved")

    def restore_variables(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, Any]:
        """{params, batch_stats} to evaluate: the averaged ones if the run kept an average."""
        state = self._as_saved(step, sharding)
        source = state["ema"] or state
        return {"params": source["params"], "batch_stats": source["batch_stats"]}

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Every array of the state saved at `step`, on the host, by path ("params/duc/...")."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {name: np.asarray(x) for name, x in by_path(self._as_saved(step, device)).items()}

    def _as_saved(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, Any]:
        like = shapes(self._metadata(step), sharding)
        return self._read(step, state=ocp.args.StandardRestore(like))["state"]

    def _metadata(self, step: int) -> dict[str, Any]:
        """Nested {name: array metadata} of the state saved at `step`."""
        if step not in self._manager.all_steps():
            have = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there: {have}"
            )
        try:
            found = self._manager.item_metadata(step)["state"]
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise self._damaged(step, error) from error
        if not found:
            raise self._damaged(step, "it does not say which arrays it holds")
        return found

    def _check(self, step: int, like: TrainState) -> None:
        saved, wanted = (
            {name: f"{tuple(x.shape)} {x.dtype}" for name, x in by_path(tree).items()}
            for tree in (self._metadata(step), like)
        )
        different = [k for k in saved | wanted if saved.get(k) != wanted.get(k)]
        if different:
            path = min(different, key=lambda k: (not k.startswith("params"), k))
            raise ConfigError(
                f"checkpoint {self.directory}/{step} does not fit the configuration: {path} is "
                f"{saved.get(path, 'absent')} in the checkpoint and {wanted.get(path, 'absent')} "
                f"in the network; {len(different)} arrays differ. Use another workdir, or the "
                f"configuration in {self.directory.parent}/config.json"
            )

    def wait(self) -> None:
        """Blocks until every save is on disk; raises CheckpointError where one is not."""
        try:
            self._manager.wait_until_finished()
        except storage.errors() as error:
            raise self._save_error(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Closes. Where an error ends one process of several, saves have `PATIENCE` to end.

        They end with the help of the others, which may be waiting for this process elsewhere.
        """
        if kind is None or issubclass(kind, Stopped) or jax.process_count() == 1:
            self.close()
            return

        def end() -> None:
            with contextlib.suppress(Exception):  # the run ends by another error
                self._manager.close()

        if not self._failed:
            thread = threading.Thread(target=end, daemon=True)
            thread.start()
            thread.join(PATIENCE)

    def close(self) -> None:
        """Raises CheckpointError for a failed save of which no other call has told."""
        try:
            self._manager.close()
        except storage.errors() as error:
            if not self._failed:
                raise self._save_error(error) from error


def by_path(tree: Any) -> dict[str, Any]:
    """{"params/duc/low_conv/kernel": leaf}, the same for a state and its saved metadata."""

    def name(key) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name, path)): leaf for path, leaf in leaves}


def checksums(state: Any) -> dict[str, int]:
    """A checksum per array of a replicated state, computed where the state is.

    The sum modulo 2**32 of each 32-bit word times an odd number that its place determines: no
    single changed word leaves it as it was.
    """
    return {name: int(value) for name, value in jax.device_get(_checksums(by_path(state))).items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def of(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        places = jax.lax.iota(jnp.uint32, words.size)
        return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)

    return {name: of(x) for name, x in arrays.items()}


def _any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())
