"""The training loop: batch -> step -> figures -> evaluation -> checkpoint, in this order.

A checkpoint therefore holds the state after an evaluation with that evaluation's scores, and a
resumed run neither repeats nor skips a step: every batch and every random number follow from the step.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from duc_dlc_jax import checkpoints, evaluate, pictures, sharding, workdirs, writers
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.models import pretrained, segmenter
from duc_dlc_jax.train_step import TrainState, create_state, init_variables, make_train_step


def total_steps(config: ml_collections.ConfigDict, images: int) -> int:
    """train.steps, or train.epochs x images / batch_size rounded up: batches cross epoch borders."""
    if config.train.steps > 0:
        return config.train.steps
    return int(np.ceil(config.train.epochs * images / config.train.batch_size))


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, in `workdir`; returns the scores of the last evaluation.

    Raises ConfigError or FileNotFoundError before any compilation where the configuration, the
    devices and the prepared data do not fit together.
    """
    config_lib.validate(config)
    workdir = Path(workdir)
    mesh = sharding.data_mesh()
    sharding.check_batch(config.train.batch_size, mesh.size)
    records = pipeline.open_records(config.data, config.data.train_split)
    val_records = pipeline.open_records(config.data, config.data.eval_split)
    spec, steps = records.spec, total_steps(config, len(records))
    _announce(config, workdir, mesh, spec, len(records), len(val_records), steps)

    model = segmenter.create(config.model, spec.num_classes, mesh.size)
    optimizer = optimizers.create(config.optimizer, steps)
    saved = checkpoints.Checkpoints(workdir, config.train.keep_latest, config.train.keep_best)
    everywhere, split = sharding.replicated(mesh), sharding.batched(mesh)
    state, position = _first_state(config, workdir, model, optimizer, saved, everywhere)
    if jax.process_index() == 0:
        workdirs.write(workdir, config, spec)
        text = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (workdir / "parameters.txt").write_text(text + "\n")

    batches = pipeline.train_iterator(
        config.data,
        records,
        seed=config.seed,
        batch_size=config.train.batch_size,
        steps=steps,
        start_step=position // config.train.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    train_step = jax.jit(
        make_train_step(model, optimizer, config),
        in_shardings=(everywhere, {"image": split, "label": split}),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
    evaluator = evaluate.Evaluator(model, spec, config.eval.batch_size)
    schedule = optimizers.poly_schedule(config.optimizer.learning_rate, config.optimizer.power, steps)
    writer = writers.Writer(workdir)
    writer.texts(0, {"config": f"```\n{config_lib.to_json(config)}\n```"})
    first = int(state.step)
    progress = writers.Progress(first, steps)
    window = _Window(config.train.batch_size)
    scores: dict[str, Any] = {}

    for step in range(first + 1, steps + 1):
        with window.waiting():
            batch = next(batches)
        batch = {name: batch[name] for name in ("image", "label")}
        state, metrics = train_step(state, sharding.to_devices(batch, split))
        window.add(metrics)

        last = step == steps
        log = last or step % config.train.log_every == 0
        if log:
            figures = window.figures(step)
            figures["learning_rate"] = float(schedule(step - 1))
            writer.scalars(step, {f"train/{name}": value for name, value in figures.items()})
        progress.show(step, window.text, log)

        evaluating = last or (config.train.eval_every and step % config.train.eval_every == 0)
        saving = evaluating or step % config.train.checkpoint_every == 0
        if not saving:
            continue
        start = time.monotonic()
        window.check_finite(step)
        metrics = None
        if evaluating:
            scores = _evaluate(config, evaluator, state, val_records, writer, workdir, spec)
            metrics = {name: scores[name] for name in ("PA", "mPA", "mIoU", checkpoints.SCORE)}
            progress.say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        saved.save(state, step * config.train.batch_size, config, metrics)
        progress.pause(time.monotonic() - start)
        window.restart()

    if not scores:  # a finished run, started again
        scores = _evaluate(config, evaluator, state, val_records, writer, workdir, spec)
    saved.wait()
    progress.say(evaluate.table(scores, spec))
    progress.say(_next_commands(workdir, saved))
    saved.close()
    writer.close()
    return scores


def _first_state(config, workdir, model, optimizer, saved, everywhere) -> tuple[TrainState, int]:
    """The latest checkpoint's state, or a new one; and the images consumed so far."""

    def fresh(variables=None):
        return create_state(model, optimizer, config, variables)

    latest = saved.latest_step()
    if latest is not None:
        for name, (old, new) in workdirs.changed_fields(workdir, config).items():
            logging.warning("resuming with %s=%r; the workdir was trained with %r", name, new, old)
        abstract = jax.eval_shape(fresh)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract
        )
        state, position = saved.restore(latest, like)
        logging.info("resuming from step %d in %s", latest, saved.directory)
        return state, position
    variables = init_variables(model, config.seed)
    if config.init.weights:
        params, batch_stats, _ = pretrained.load_backbone(
            config.init.weights,
            config.init.source,
            variables["params"],
            variables["batch_stats"],
            config.model,
        )
        variables = {"params": params, "batch_stats": batch_stats}
    else:
        logging.warning("the backbone starts from scratch: init.weights is empty")
    return jax.jit(fresh, out_shardings=everywhere)(variables), 0


def _evaluate(config, evaluator, state, records, writer, workdir, spec) -> dict[str, Any]:
    step = int(state.step)
    start = time.monotonic()
    examples = pipeline.eval_examples(records, jax.process_index(), jax.process_count())
    scores, kept = evaluator.run(state.variables(), examples, keep=config.eval.pictures)
    seconds = time.monotonic() - start
    rate = {"val/images_per_second": scores["images"] / seconds}
    writer.scalars(step, evaluate.scalars(scores, spec) | rate)
    if jax.process_index() == 0 and kept:
        pictures.write_triples(workdir / "pictures" / f"step-{step}", kept, spec)
        for i, example in enumerate(kept):
            writer.images(step, {f"val/{i}": pictures.triple(example, spec)[None]})
        writer.flush()
    return scores


class _Window:
    """Figures of the steps since the last log line; keeps at most two steps in flight."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._metrics: list[dict[str, jax.Array]] = []
        self._in_flight: deque[jax.Array] = deque()
        self.text = ""
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, so that evaluations and checkpoints do not count as training."""
        self._start, self._waited, self._steps = time.monotonic(), 0.0, 0

    def waiting(self):
        """Context: the time inside is time spent waiting for data."""
        return _Stopwatch(self)

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._metrics.append(metrics)
        self._steps += 1
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > 2:
            done = self._in_flight.popleft()
            self.text = f"loss {float(done):.4f}  {self._rate():.1f} images/s"

    def _rate(self) -> float:
        return self._steps * self._batch_size / max(time.monotonic() - self._start, 1e-9)

    def figures(self, step: int) -> dict[str, float]:
        """Means over the window, rate and share of waiting; raises where the loss is not finite."""
        self.check_finite(step)
        rows = jax.device_get(self._metrics)
        elapsed = max(time.monotonic() - self._start, 1e-9)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        means["images_per_second"] = self._rate()
        means["data_wait_share"] = self._waited / elapsed
        self.text = f"loss {means['loss']:.4f}  {means['images_per_second']:.1f} images/s"
        self.text += f"  {100 * means['data_wait_share']:.0f}% waiting for data"
        self._metrics.clear()
        self.restart()
        return means

    def check_finite(self, step: int) -> None:
        """Raises FloatingPointError before a state with NaN could be saved."""
        for row in jax.device_get(self._metrics):
            if not np.isfinite(row["loss"]) or not np.isfinite(row["grad_norm"]):
                raise FloatingPointError(
                    f"loss {row['loss']}, gradient norm {row['grad_norm']} at or before step {step}: "
                    "nothing was saved since the last checkpoint; lower optimizer.learning_rate or "
                    "set optimizer.clip_norm"
                )


class _Stopwatch:
    def __init__(self, window: _Window):
        self._window = window

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_) -> None:
        self._window._waited += time.monotonic() - self._start


def _announce(config, workdir, mesh, spec: LabelSpec, images: int, val_images: int, steps: int) -> None:
    if jax.process_index() != 0:
        return
    logging.info("configuration:\n%s", config_lib.to_json(config))
    mapping = ", ".join(
        f"{raw}->{'ignored' if train == 255 else f'{train} {spec.classes[train]}'}"
        for raw, train in sorted(spec.raw_to_train.items())
    )
    logging.info("labels of %s, raw id -> train id: %s", spec.name, mapping)
    logging.info(
        "%d training and %d evaluation images, %d steps of %d images on %d %s device(s), workdir %s",
        images,
        val_images,
        steps,
        config.train.batch_size,
        mesh.size,
        mesh.devices.flat[0].platform,
        workdir,
    )


def _next_commands(workdir: Path, saved: checkpoints.Checkpoints) -> str:
    return "\n".join(
        [
            f"best checkpoint  {saved.directory}/{saved.best_step()}",
            f"pictures         {workdir}/pictures",
            f"evaluate         python -m duc_dlc_jax.evaluate --workdir={workdir}",
            "predict          python -m duc_dlc_jax.predict "
            f"--model={workdir} --input=IMAGE_OR_FOLDER --output=predictions",
            f"curves           tensorboard --logdir={workdir}",
        ]
    )
