"""One run of a grid: trained from its seed, scored with boundaries, its costs measured.

A variant's programs are compiled once and serve all of its seeds: the seed enters as data (initial
parameters, batches, the seed of dropout). Every `train.checkpoint_every` steps state and curve are
saved, so that a run that was cut off goes on, with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from duc_dlc_jax import (
    evaluate,
    grafting,
    initial,
    pictures,
    protocols,
    provenance,
    sharding,
    storage,
)  # fmt: skip
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.ablate import crops
from duc_dlc_jax.ablate.results import Files, weights_digest
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.batches import device_batches
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.errors import NotFinite
from duc_dlc_jax.models import counts, segmenter
from duc_dlc_jax.progress import Progress
from duc_dlc_jax.train_step import TrainState, create_state, make_train_step, state_shapes

TIMED_STEPS = 10  # of a batch that stays on the device
TIMED_IMAGES = 16
LOSSES_EVERY = 20  # steps that are in flight at most


class Data:
    """The two splits, decoded once (data.in_memory) for all runs of the process; val's crops."""

    FIELDS = ("name", "dir", "staging_dir", "train_split", "eval_split", "in_memory")

    def __init__(self, data: ml_collections.ConfigDict):
        self._opened = [data[field] for field in self.FIELDS]
        self.train = open_records(data, data.train_split)
        self.val = open_records(data, data.eval_split)
        self.crops = crops.choose(self.val)

    def serves(self, data: ml_collections.ConfigDict) -> bool:
        """Whether these are the splits of `data`: a variant may name others."""
        return self._opened == [data[field] for field in self.FIELDS]


@dataclasses.dataclass
class Course:
    """What a run has recorded so far, as JSON has it.

    curve: its points. losses: of the steps since the last point. seconds: by what they went to,
    without `train`, which is what remains of `total`. weights: SHA-256 of the file that it began
    from; empty: none.
    """

    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("compile", "evaluate", "save", "total"), 0.0)
    )
    weights: str = ""

    @contextlib.contextmanager
    def spent(self, what: str):
        start = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - start

    def add(self, window: list[tuple[Any, Any]], step: int) -> None:
        """(loss, gradient norm) of the steps up to `step`.

        Raises NotFinite where one of them is not finite: such a step was not taken.
        """
        for i, (loss, norm) in enumerate(window, step - len(window) + 1):
            if not np.isfinite([loss, norm]).all():
                raise NotFinite(f"loss {loss}, gradient norm {norm} in step {i}")
            self.losses.append(float(loss))

    def point(self, step: int, scores: dict[str, Any]) -> None:
        figures = {name: float(scores[name]) for name in ("mIoU", "PA")}
        self.curve.append({"step": step, "loss": float(np.mean(self.losses)), **figures})
        self.losses = []


class Trainer:
    """The compiled programs of one variant. A curve's losses are means since its last point.

    config: of any of its seeds. Raises ConfigError where the batch does not divide over the
    devices.
    """

    def __init__(self, config: ml_collections.ConfigDict, data: Data):
        self._config, self._data = config, data
        self._mesh = sharding.training_mesh(config)
        spec = data.train.spec
        self._steps = optimizers.total_steps(config, len(data.train))
        groups = sharding.bn_groups(config, self._mesh)
        self._model = segmenter.create(config.model, spec.num_classes, groups)
        self._optimizer = optimizers.create(config.optimizer, self._steps)
        everywhere = sharding.replicated(self._mesh)
        step = make_train_step(self._model, self._optimizer, config, data.train.pixels())
        self._jitted = sharding.jit_train_step(step, self._mesh)
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
        self._code = provenance.code()

    def run(self, config: ml_collections.ConfigDict, files: Files | None = None) -> dict[str, Any]:
        """Trains and scores one seed, from its last checkpoint on if it was cut off.

        Raises NotFinite where a loss or gradient is not finite, and CheckpointError where a
        checkpoint cannot be written, or none of those that there are can be read.
        """
        files, begin = files or Files(), time.monotonic()
        with contextlib.ExitStack() as stack:
            saved = self._saved(config, files.unfinished, stack)
            state, first, course = self._start(config, saved)
            begin -= course.seconds["total"]
            batches = stack.enter_context(contextlib.closing(self._batches(config, first)))
            seed, window, progress = np.uint32(config.seed), [], Progress(self._steps, "step")
            for step, (batch, _) in enumerate(batches, first + 1):
                if self._compiled is None:
                    with course.spent("compile"):
                        self._compile(state, batch, seed)
                state, metrics = self._step(state, batch, seed)
                window.append((metrics["loss"], metrics["grad_norm"]))
                last = step == self._steps
                evaluating = last or _every(config.train.eval_every, step)
                saving = not last and _every(config.train.checkpoint_every, step)
                if evaluating or saving or step % LOSSES_EVERY == 0:
                    course.add(jax.device_get(window), step)
                    window = []
                    progress.show(step, f"loss {course.losses[-1]:.4f}", log=last)
                start = time.monotonic()
                if evaluating:
                    with course.spent("evaluate"):
                        scores, shown = self._scores(state, last)
                    course.point(step, scores)
                if saving and saved:
                    with course.spent("save"):
                        course.seconds["total"] = time.monotonic() - begin
                        position, notes = step * config.train.batch_size, dataclasses.asdict(course)
                        saved.save(state, position, config, notes=notes)
                progress.pause(time.monotonic() - start)
        course.seconds["total"] = time.monotonic() - begin
        if files.weights:
            _save(files.weights, state.variables())
        if files.masks:
            self._write_masks(files.masks, shown)
        if not self._rates:
            self._rates = self._measure(state, batch, seed)
        return self._result(config, course, scores, shown)

    def _result(self, config, course: Course, scores, shown: dict[int, Any]) -> dict[str, Any]:
        """What a run's file holds."""
        val, size = self._data.val, self._data.val.size(0)
        others = sum(value for name, value in course.seconds.items() if name != "total")
        return {
            "seed": config.seed,
            "config": config.to_dict(),
            "steps": self._steps,
            "images": [len(self._data.train), len(val)],
            "hardware": hardware(),
            "code": self._code,
            "weights_sha256": course.weights,
            "seconds": course.seconds | {"train": course.seconds["total"] - others},
            "curve": course.curve,
            "val": evaluate.summary(scores, val.spec),
            "crops": [
                crops.scored(crop, shown[crop.record], val.spec.num_classes)
                for crop in self._data.crops
            ],
            "parameters": counts.parameters(self._model),
            "macs": counts.macs(self._model, *size),
            "macs_image": list(size),
            "images_per_second": self._rates,
            "step_bytes_per_device": self._memory,
            "grids": counts.grids(*size, self._model.output_stride, self._model.upsampling),
        }

    def _batches(self, config, first: int):
        position = first * config.train.batch_size
        records, count = self._data.train, self._steps - first
        return device_batches(config, records, position, count, self._mesh)

    def _saved(self, config, folder: Path | None, stack: contextlib.ExitStack):
        """The checkpoints of a run's folder, which is a workdir as `main` has it."""
        if folder is None:
            return None
        from duc_dlc_jax import checkpoints, workdirs

        workdirs.write(epath.Path(folder), config, self._data.train.spec)
        return stack.enter_context(checkpoints.Checkpoints(folder, training=True))

    def _start(self, config, saved) -> tuple[TrainState, int, Course]:
        """State, steps done and course of the last checkpoint, or of a run's beginning."""
        everywhere = sharding.replicated(self._mesh)
        like = sharding.shapes(state_shapes(self._model, config), everywhere)
        if saved and (restored := saved.restore_latest(like)):
            step = int(restored[0].step)
            logging.info("going on from step %d in %s", step, saved.directory)
            return restored[0], step, Course(**saved.notes(step))
        digest = weights_digest(config.init.weights, config.init.source)
        variables = initial.variables(self._model, config, self._data.train)
        return self._create(variables), 0, Course(weights=digest)

    def _compile(self, state, batch, seed) -> None:
        """Compiles the step, and reads the memory that it needs on a device."""
        self._compiled = self._jitted.lower(state, batch, seed).compile()
        self._memory = sharding.bytes_per_device(self._compiled)

    def _step(self, state, batch, seed) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._compiled(state, batch, seed)

    def _scores(self, state: TrainState, last: bool) -> tuple[dict[str, Any], dict[int, Any]]:
        """Scores; after the last step with boundaries, and the examples with crops by number."""
        examples = pipeline.eval_examples(self._data.val, threads=self._config.data.threads)
        numbered = (example | {"record": i} for i, example in enumerate(examples))
        wanted, shown = {crop.record for crop in self._data.crops}, {}

        def keep(example: dict[str, Any]) -> None:
            if last and example["record"] in wanted:
                shown[example["record"]] = example

        variables = state.variables()
        return self._evaluator.run(variables, numbered, each=keep, boundary=last)[0], shown

    def _write_masks(self, path: Path, shown: dict[int, Any]) -> None:
        """The crops of the predictions, and of the labels beside them, as palette PNGs."""
        for place, what in ((path, "prediction"), (path.with_name("label.png"), "label")):
            masks = [crop.of(shown[crop.record][what]) for crop in self._data.crops]
            with storage.whole_file(place) as partial, partial.open("wb") as file:
                pictures.write_ids(file, crops.strip(masks), self._data.val.spec)

    def _measure(self, state, batch, seed) -> dict[str, float]:
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
                state, metrics = self._step(state, batch, seed)
            jax.block_until_ready((state, metrics))
        trained = TIMED_STEPS * len(batch["image"]) / (time.monotonic() - start)
        return {"train": trained, "label": labelled}


def _every(steps: int, step: int) -> bool:
    """Whether it is time for what happens every so many steps; 0 = never."""
    return steps > 0 and step % steps == 0


def hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu": provenance.cpu(),
        "cores": os.cpu_count(),
        "usable_cores": provenance.usable_cores(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _save(path: Path, variables: Any) -> None:
    """params and batch_stats as an .npz, by names like params/dlc/reduce_conv/kernel."""
    arrays: Any = grafting.flat(variables)
    with storage.whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
