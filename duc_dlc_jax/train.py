"""The training loop: batch -> step -> figures -> evaluation -> checkpoint, in this order.

A checkpoint therefore holds the state after an evaluation with that evaluation's scores, and a
resumed run neither repeats nor skips a step: every batch and every random number follow from the
step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath

from duc_dlc_jax import (
    checkpoints,
    distributed,
    evaluate,
    initial,
    pictures,
    profiling,
    protocols,
    sharding,
    storage,
    workdirs,
    writers,
)
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.batches import check_position, device_batches
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.errors import Stopped
from duc_dlc_jax.goodput import Goodput
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.progress import Progress
from duc_dlc_jax.stopping import StopSignal
from duc_dlc_jax.train_step import TrainState, first_state, make_train_step, state_shapes


def train(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, record_names: bool = False
) -> dict[str, Any]:
    """Trains, or goes on training, in `workdir`; returns the scores of the last evaluation.

    record_names: each step's records go by name to records.jsonl, those that this process reads.

    Raises ConfigError or FileNotFoundError before any compilation where the configuration, the
    devices, the workdir, its classes and the prepared data do not fit together.
    """
    config_lib.validate(config)
    workdir = storage.path(workdir)
    storage.check(workdir, write=jax.process_index() == 0, flag="--workdir")
    config = workdirs.located(config)
    initial.check_not_itself(config.init, workdir)
    mesh = sharding.training_mesh(config)
    records = open_records(config.data, config.data.train_split)
    val_records = open_records(config.data, config.data.eval_split)
    distributed.meet("records")  # which some hosts may have had to copy first
    for split in (records, val_records):
        if not split.labelled:
            raise config_lib.ConfigError(f"split {split.split} of {split.folder} has no labels")
    if not (workdir / "checkpoints").exists():
        initial.check(config.init)
    spec, stop = records.spec, StopSignal()
    model = segmenter.create(config.model, spec.num_classes, sharding.bn_groups(config, mesh))
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        kept = config.train.keep_latest, config.train.keep_best
        saved = stack.enter_context(checkpoints.Checkpoints(workdir, *kept, training=True))
        if saved.latest_step() is not None:
            config.init = workdirs.start_of(workdir, config)
        state, position = _first_state(config, workdir, model, saved, mesh, records)
        steps = optimizers.total_steps(config, len(records), int(state.step), position)
        _announce(config, workdir, mesh, spec, len(records), len(val_records), steps)
        optimizer = optimizers.create(config.optimizer, steps)
        if jax.process_index() == 0:
            workdirs.write(workdir, config, spec)
            text = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            (workdir / "parameters.txt").write_text(text + "\n")
        writer = stack.enter_context(contextlib.closing(writers.Writer(workdir, int(state.step))))
        writer.texts(0, {"config": f"```\n{config_lib.to_json(config)}\n```"})
        batches = device_batches(config, records, position, steps - int(state.step), mesh)
        stack.enter_context(contextlib.closing(batches))
        if record_names:
            batches = _with_names(batches, records, workdir, int(state.step) + 1)
        step = make_train_step(model, optimizer, config, records.pixels())
        train_step = sharding.jit_train_step(step, mesh)
        evaluation = _Evaluation(config, model, val_records, writer, workdir, stop)
        goodput = stack.enter_context(contextlib.closing(Goodput(workdir, int(state.step))))
        trace = stack.enter_context(contextlib.closing(profiling.Trace(config.profile)))
        loop = _Loop(
            config=config,
            steps=steps,
            train_step=train_step,
            evaluation=evaluation,
            saved=saved,
            writer=writer,
            stop=stop,
            goodput=goodput,
            trace=trace,
            figures=writers.StepFigures(config.train.batch_size, records.name),
            progress=Progress(steps, "step", quiet=jax.process_index() != 0),
            first=int(state.step),
            position=position,
        )
        scores = loop.run(state, batches)
        if jax.process_index() == 0:
            print(f"{evaluate.table(scores, spec)}\n{_next_commands(workdir, saved)}")
            print(f"goodput          {goodput.sentence(steps)}")
    return scores


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The training steps and what is done between them.

    first: updates done when it begins, in `position` training images, also of another batch size.
    """

    config: ml_collections.ConfigDict
    steps: int
    train_step: Any  # of `sharding.jit_train_step`
    evaluation: _Evaluation
    saved: checkpoints.Checkpoints
    writer: writers.Writer
    stop: StopSignal
    goodput: Goodput
    trace: profiling.Trace
    figures: writers.StepFigures
    progress: Progress
    first: int
    position: int
    scores: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the last evaluation

    def run(self, state: TrainState, batches: Iterator) -> dict[str, Any]:
        """From `first` on; returns the scores of the last evaluation.

        Raises Stopped after one of `errors.STOP_SIGNALS`, with the state saved.
        """
        first, seed = self.first, np.uint32(self.config.seed)
        self.goodput.started()
        if first and self._evaluating(first) and not self.saved.has_scores(first):
            self._keep(state, first, evaluating=True)  # a signal had come during it
        for step in range(first + 1, self.steps + 1):
            self.trace.before(step - first - 1)
            with self.figures.waiting(), self.goodput.spent("data"):
                batch, records = next(batches)
            compiling = contextlib.nullcontext()
            if step == first + 1:
                compiling = self.goodput.spent("compile")
            with compiling:
                if step == first + 1 and distributed.several():
                    self.train_step.lower(state, batch, seed).compile()
                    distributed.meet("the first step")  # some may have had to compile it
                state, metrics = self.train_step(state, batch, seed)
            self.trace.after(step - first - 1, state)
            self.figures.add(metrics, records)
            self._log(step)
            stopping = self.stop.reached()
            evaluating = self._evaluating(step)
            if evaluating or stopping or step % self.config.train.checkpoint_every == 0:
                start = time.monotonic()
                self.figures.check_finite(step)
                self._keep(state, step, evaluating, stopping)
                self.progress.pause(time.monotonic() - start)
                self.figures.restart()
        self.saved.wait()
        return self.scores or self.evaluation(state)  # a finished run only evaluates

    def _evaluating(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.steps or bool(every and step % every == 0)

    def _log(self, step: int) -> None:
        log = step == self.steps or step % self.config.train.log_every == 0
        if log:
            values = self.figures.take(step) | {"learning_rate": self._learning_rate(step)}
            values = {f"train/{name}": value for name, value in values.items()}
            self.writer.scalars(step, values | self.goodput.line(step))
        self.progress.show(step, self.figures.text, log)

    def _learning_rate(self, step: int) -> float:
        optimizer = self.config.optimizer
        schedule = optimizers.poly_schedule(
            optimizer.learning_rate, optimizer.power, self.steps, optimizer.warmup_steps
        )
        return float(np.asarray(schedule(step - 1)))

    def _keep(self, state, step: int, evaluating: bool, stopping: bool = False) -> None:
        """Saves the state, with its scores where it is time for them.

        Raises Stopped after such a signal, which also ends an evaluation.
        """
        headline = None
        if evaluating and not stopping:
            try:
                with self.goodput.spent("evaluation"):
                    self.scores = self.evaluation(state)
                headline = {name: self.scores[name] for name in evaluate.HEADLINE}
                figures = "  ".join(f"{name} {value:.4f}" for name, value in headline.items())
                self.progress.say(f"step {step}: {figures}")
            except Stopped:
                stopping = True
        with self.goodput.spent("checkpoint"):
            size = self.config.train.batch_size
            position = self.position + (step - self.first) * size
            self.writer.flush()  # a resumed run finds the lines up to its step
            self.saved.save(state, position, self.config, headline)
            if stopping:
                self.saved.wait()
        self.goodput.line(step)
        if stopping:
            raise Stopped(
                f"stopped by {self.stop.signal}; step {step} is saved, the same command goes on"
            )


def _with_names(batches, records, workdir: epath.Path, step: int):
    """The batches; a line of records.jsonl is written before each, from `step` on."""
    index = jax.process_index()
    name = f"records-{index}.jsonl" if index else "records.jsonl"
    with contextlib.closing(storage.Lines(workdir / name, every=0)) as file:
        for batch, indices in batches:
            names = [records.name(int(i)) for i in indices]
            file.write(json.dumps({"step": step, "records": names}))
            step += 1
            yield batch, indices


def _first_state(config, workdir, model, saved, mesh, records) -> tuple[TrainState, int]:
    """The latest checkpoint's state, or a new one; and the images consumed so far."""

    everywhere = sharding.replicated(mesh)
    if saved.latest_step() is not None:
        workdirs.check_classes(workdir, records.spec)
        for name, (old, new) in workdirs.changed_fields(workdir, config).items():
            logging.warning("resuming with %s=%r; the workdir was trained with %r", name, new, old)
        like = sharding.shapes(state_shapes(model, config), everywhere)
        if restored := saved.restore_latest(like):
            check_position(restored[1], config.train.batch_size)
            logging.info("resuming from step %d in %s", int(restored[0].step), saved.directory)
            return restored
    variables = initial.variables(model, config, records)
    create = functools.partial(first_state, model, config)
    return jax.jit(create, out_shardings=everywhere)(variables), 0


class _Evaluation:
    """Scores of a state on the evaluation split, written with their pictures."""

    def __init__(self, config, model, records, writer, workdir, stop):
        self._config, self._records, self._stop = config, records, stop
        self._writer, self._workdir = writer, workdir
        self._evaluator = evaluate.Evaluator(
            model,
            records.spec,
            config.eval.batch_size,
            protocols.Protocol.from_config(config).planned(records.sizes()),
        )

    def __call__(self, state: TrainState) -> dict[str, Any]:
        step, spec, start = int(state.step), self._records.spec, time.monotonic()
        processes = jax.process_count()
        examples = pipeline.eval_examples(self._records, jax.process_index(), processes)
        examples = self._stop.watched(examples, -(-len(self._records) // processes))
        scores, kept = self._evaluator.run(
            state.variables(), examples, keep=self._config.eval.pictures
        )
        rate = scores["images"] / (time.monotonic() - start)
        values = evaluate.scalars(scores, spec) | {"val/images_per_second": rate}
        self._writer.scalars(step, values)
        if jax.process_index() == 0 and kept:
            pictures.write_triples(self._workdir / "pictures" / f"step-{step}", kept, spec)
            for i, example in enumerate(kept):
                self._writer.images(step, {f"val/{i}": pictures.triple(example, spec)[None]})
            self._writer.flush()
        return scores


def _announce(
    config, workdir, mesh, spec: LabelSpec, images: int, val_images: int, steps: int
) -> None:
    if jax.process_index() != 0:
        return
    logging.info("the configuration is in %s", workdir / "config.json")
    mapping = "\n".join(f"{raw} -> {train} {name}" for train, name, raw in spec.mapping())
    logging.info("labels of %s, raw ids -> train id:\n%s", spec.name, mapping)
    logging.info(
        "%d training and %d evaluation images, %d steps of %d images, %d %s device(s), workdir %s",
        images,
        val_images,
        steps,
        config.train.batch_size,
        mesh.size,
        mesh.devices.flat[0].platform,
        workdir,
    )


def _next_commands(workdir: epath.Path, saved: checkpoints.Checkpoints) -> str:
    run = shlex.quote(str(workdir))
    return "\n".join(
        [
            f"best checkpoint  {saved.directory}/{saved.best_step()}",
            f"pictures         {workdir}/pictures",
            f"evaluate         python -m duc_dlc_jax.evaluate --workdir={run}",
            "predict          python -m duc_dlc_jax.predict "
            f"--model={run} --input=IMAGE_OR_FOLDER --output=predictions",
            f"export           python -m duc_dlc_jax.export --workdir={run} --output=BUNDLE",
            f"curves           tensorboard --logdir={run}",
        ]
    )
