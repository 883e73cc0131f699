"""Orbax checkpoints: train state, position in the data and configuration, saved asynchronously."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.train_step import TrainState

SCORE = "final_score"


def _score(metrics: dict[str, float]) -> float:
    value = metrics.get(SCORE, math.nan)
    return -math.inf if math.isnan(value) else value


def _path(keys) -> str:
    """ "params/backbone/..." of a tree's path."""
    names = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in keys)
    return "/".join(map(str, names))


class Checkpoints:
    """The checkpoints below `workdir/checkpoints`, by step.

    Kept: the latest `keep_latest` and, of those saved with scores, the best `keep_best` by Final
    Score. (Orbax's `max_to_keep` with `best_fn` would delete the newest while scores fall.)
    """

    def __init__(self, workdir: str | Path, keep_latest: int = 2, keep_best: int = 1):
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(max(keep_latest, 1)),
                checkpoint_managers.BestN(
                    get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=_score, best_mode="max"
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
        data = ocp.args.Composite(data=ocp.args.JsonRestore())
        return self._manager.restore(step, args=data)["data"]["position"]

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest Final Score; the latest where none was evaluated."""
        scored = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scored = {step: _score(m) for step, m in scored.items() if m and SCORE in m}
        return max(scored, key=lambda s: (scored[s], s)) if scored else self.latest_step()

    def save(
        self,
        state: TrainState,
        position: int,
        config: ml_collections.ConfigDict,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Saves at `state.step`. position: training images consumed, over all epochs and hosts."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"position": position}),
                config=ocp.args.JsonSave(config.to_dict()),
            ),
            metrics=metrics or {},
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, int]:
        """The state saved at `step`, placed as `like` (ShapeDtypeStructs), and the position.

        Raises FileNotFoundError for a step that is not there and ConfigError for another structure.
        """
        self._check(step, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]["position"]

    def restore_variables(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, Any]:
        """{params, batch_stats} to evaluate: the averaged ones if the run kept an average."""
        state = self._as_saved(step, sharding)
        source = state["ema"] or state
        return {"params": source["params"], "batch_stats": source["batch_stats"]}

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Every array of the state saved at `step`, on the host, by path ("params/duc/...")."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves = jax.tree_util.tree_leaves_with_path(self._as_saved(step, device))
        return {_path(path): np.asarray(leaf) for path, leaf in leaves}

    def _as_saved(self, step: int, sharding: jax.sharding.Sharding) -> dict[str, Any]:
        def struct(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        like = jax.tree.map(struct, self._metadata(step))
        return self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        )["state"]

    def _metadata(self, step: int) -> dict[str, Any]:
        """Nested {name: array metadata} of the state saved at `step`."""
        if step not in self._manager.all_steps():
            have = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there: {have}"
            )
        return self._manager.item_metadata(step)["state"]

    def _check(self, step: int, like: TrainState) -> None:
        def shapes(tree):
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {_path(path): tuple(x.shape) for path, x in leaves}

        saved, wanted = shapes(self._metadata(step)), shapes(like)
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
        """Blocks until every save is on disk; raises what a save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
