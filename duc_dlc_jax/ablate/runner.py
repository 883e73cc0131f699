"""One run of a grid: trained from its seed, scored with boundaries, its costs measured.

A variant's programs are compiled once and serve all of its seeds: the seed enters as data (initial
parameters, batches, the key of dropout). Nothing is saved but the result, and the weights if asked
for: a run takes seconds to minutes and is done again when it was cut off.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

from duc_dlc_jax import describe, evaluate, initial, protocols, sharding
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.progress import Progress
from duc_dlc_jax.train_step import TrainState, create_state, make_train_step

TIMED_STEPS = 10  # of a batch that stays on the device
TIMED_IMAGES = 16
LOSSES_EVERY = 20  # steps that are in flight at most


class Data:
    """The two splits, decoded once (data.in_memory) for all runs of the process."""

    def __init__(self, data: ml_collections.ConfigDict):
        self.train = open_records(data, data.train_split)
        self.val = open_records(data, data.eval_split)


class Trainer:
    """The compiled programs of one variant. A curve's losses are means since its last point.

    config: of any of its seeds. Raises ConfigError where the batch does not divide over the
    devices.
    """

    def __init__(self, config: ml_collections.ConfigDict, data: Data):
        from duc_dlc_jax.train import total_steps  # late: the checkpoints' library

        self._config, self._data = config, data
        self._mesh = sharding.training_mesh(config)
        spec = data.train.spec
        self._steps = total_steps(config, len(data.train))
        groups = sharding.bn_groups(config, self._mesh)
        self._model = segmenter.create(config.model, spec.num_classes, groups)
        self._optimizer = optimizers.create(config.optimizer, self._steps)
        everywhere = sharding.replicated(self._mesh)
        step = make_train_step(self._model, self._optimizer, config, data.train.pixels())
        self._jitted = jax.jit(
            step,
            in_shardings=(everywhere, None, everywhere),
            out_shardings=everywhere,
            donate_argnums=0,
        )
        self._create = jax.jit(
            lambda variables: create_state(self._model, self._optimizer, config, variables),
            out_shardings=everywhere,
        )
        self._compiled: Any = None
        self._memory = 0
        protocol = protocols.Protocol.from_config(config).planned(data.val.sizes())
        batch = config.eval.batch_size
        self._evaluator = evaluate.Evaluator(self._model, spec, batch, protocol)
        self._rates: dict[str, float] = {}

    def run(self, config: ml_collections.ConfigDict, weights: Path | None = None) -> dict[str, Any]:
        """Trains and scores one seed; `weights`: an .npz to write the final network to.

        Raises FloatingPointError where the loss is not finite.
        """
        begin, seconds, curve = time.monotonic(), {"compile": 0.0, "evaluate": 0.0}, []
        state, key = self._first_state(config), jax.random.key(config.seed)
        every = config.train.eval_every
        losses, window, progress = [], [], Progress(self._steps, "step")
        scores: dict[str, Any] = {}
        with contextlib.closing(self._batches(config)) as batches:
            for step, (batch, _) in enumerate(batches, 1):
                if step == 1 and self._compiled is None:
                    seconds["compile"] = self._compile(state, batch, key)
                state, metrics = self._step(state, batch, key)
                window.append(metrics["loss"])
                last = step == self._steps
                evaluating = last or (every and step % every == 0)
                if evaluating or step % LOSSES_EVERY == 0:
                    losses, window = losses + jax.device_get(window), []
                    if not np.isfinite(losses[-1]):
                        raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
                    progress.show(step, f"loss {losses[-1]:.4f}", log=last)
                if evaluating:
                    start = time.monotonic()
                    scores = self._scores(state, boundary=last)
                    point = {name: scores[name] for name in ("mIoU", "PA")}
                    curve.append({"step": step, "loss": float(np.mean(losses)), **point})
                    losses = []
                    seconds["evaluate"] += time.monotonic() - start
                    progress.pause(time.monotonic() - start)
        total = time.monotonic() - begin
        seconds["train"] = total - sum(seconds.values())
        if weights is not None:
            _save(weights, state.variables())
        if not self._rates:
            self._rates = self._measure(state, batch, key)
        size = self._data.val.size(0)
        return {
            "seed": config.seed,
            "config": config.to_dict(),
            "steps": self._steps,
            "images": [len(self._data.train), len(self._data.val)],
            "hardware": hardware(),
            "seconds": seconds | {"total": total},
            "curve": curve,
            "val": evaluate.summary(scores, self._data.val.spec),
            "parameters": describe.parameters(self._model),
            "macs": describe.macs(self._model, *size),
            "macs_image": list(size),
            "images_per_second": self._rates,
            "step_bytes_per_device": self._memory,
            "grids": describe.grids(*size, self._model.output_stride, self._model.upsampling),
        }

    def _batches(self, config):
        from duc_dlc_jax.train import device_batches

        return device_batches(config, self._data.train, 0, self._steps, self._mesh)

    def _first_state(self, config) -> TrainState:
        return self._create(initial.variables(self._model, config, self._data.train))

    def _compile(self, state, batch, key) -> float:
        """Compiles the step, reads the memory it needs on a device, and returns its seconds."""
        start = time.monotonic()
        self._compiled = self._jitted.lower(state, batch, key).compile()
        self._memory = sharding.bytes_per_device(self._compiled)
        return time.monotonic() - start

    def _step(self, state, batch, key) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._compiled(state, batch, key)

    def _scores(self, state: TrainState, boundary: bool) -> dict[str, Any]:
        examples = pipeline.eval_examples(self._data.val, threads=self._config.data.threads)
        return self._evaluator.run(state.variables(), examples, boundary=boundary)[0]

    def _measure(self, state, batch, key) -> dict[str, float]:
        """Images/s of the step on a batch that stays where it is, and of labelling from the host.

        The state is used up.
        """
        example = self._data.val[0]
        variables = jax.tree.map(lambda x: x.copy(), state.variables())

        def label() -> float:
            start = time.monotonic()
            for _ in self._evaluator.predictor.batches(variables, [example] * TIMED_IMAGES):
                pass
            return time.monotonic() - start

        label()
        labelled = TIMED_IMAGES / min(label() for _ in range(3))
        for _ in range(2):  # twice: the first round fills queues
            start = time.monotonic()
            for _ in range(TIMED_STEPS):
                state, metrics = self._step(state, batch, key)
            jax.block_until_ready((state, metrics))
        trained = TIMED_STEPS * len(batch["image"]) / (time.monotonic() - start)
        return {"train": trained, "label": labelled}


def hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _save(path: Path, variables: Any) -> None:
    """params and batch_stats as an .npz, by names like params/dlc/reduce_conv/kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    partial = path.with_suffix(".partial.npz")
    named: Any = {name: np.asarray(value) for name, value in flat.items()}
    np.savez(partial, **named)
    partial.replace(path)
