"""The training loop: batch -> step -> figures -> evaluation -> checkpoint, in this order.

A checkpoint therefore holds the state after an evaluation with that evaluation's scores, and a
resumed run neither repeats nor skips a step: every batch and every random number follow from the
step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview

from duc_dlc_jax import (
    checkpoints,
    evaluate,
    grafting,
    pictures,
    protocols,
    sharding,
    workdirs,
    writers,
)
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.models import pretrained, segmenter
from duc_dlc_jax.progress import Progress
from duc_dlc_jax.train_step import TrainState, create_state, init_variables, make_train_step


def total_steps(config: ml_collections.ConfigDict, images: int) -> int:
    """train.steps, or train.epochs x images / batch_size rounded up (batches cross epochs)."""
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
    mesh = sharding.training_mesh(config)
    records = open_records(config.data, config.data.train_split)
    val_records = open_records(config.data, config.data.eval_split)
    for split in (records, val_records):
        if not split.labelled:
            raise config_lib.ConfigError(f"split {split.split} of {split.folder} has no labels")
    spec, steps = records.spec, total_steps(config, len(records))
    _announce(config, workdir, mesh, spec, len(records), len(val_records), steps)

    model = segmenter.create(config.model, spec.num_classes, sharding.bn_groups(config, mesh))
    optimizer = optimizers.create(config.optimizer, steps)
    with contextlib.ExitStack() as stack:
        kept = config.train.keep_latest, config.train.keep_best
        saved = stack.enter_context(contextlib.closing(checkpoints.Checkpoints(workdir, *kept)))
        state, position = _first_state(config, workdir, spec, model, optimizer, saved, mesh)
        if jax.process_index() == 0:
            workdirs.write(workdir, config, spec)
            text = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            (workdir / "parameters.txt").write_text(text + "\n")
        writer = stack.enter_context(contextlib.closing(writers.Writer(workdir, int(state.step))))
        writer.texts(0, {"config": f"```\n{config_lib.to_json(config)}\n```"})
        batches = device_batches(config, records, position, steps - int(state.step), mesh)
        stack.enter_context(contextlib.closing(batches))
        step = make_train_step(model, optimizer, config, records.pixels())
        train_step = sharding.jit_train_step(step, mesh)
        evaluation = _Evaluation(config, model, val_records, writer, workdir)
        scores = _loop(config, state, steps, batches, train_step, evaluation, saved, writer)
        if jax.process_index() == 0:
            print(f"{evaluate.table(scores, spec)}\n{_next_commands(workdir, saved)}")
    return scores


def _loop(config, state, steps, batches, train_step, evaluation, saved, writer) -> dict[str, Any]:
    """The steps from the state's on; returns the scores of the last evaluation."""
    first, scores = int(state.step), {}
    progress = Progress(steps, "step", quiet=jax.process_index() != 0)
    figures = writers.StepFigures(config.train.batch_size)
    learning_rate = optimizers.poly_schedule(
        config.optimizer.learning_rate,
        config.optimizer.power,
        steps,
        config.optimizer.warmup_steps,
    )
    for step in range(first + 1, steps + 1):
        with figures.waiting():
            batch = next(batches)
        state, metrics = train_step(state, batch)
        figures.add(metrics)

        last = step == steps
        log = last or step % config.train.log_every == 0
        if log:
            values = figures.take(step) | {
                "learning_rate": float(np.asarray(learning_rate(step - 1)))
            }
            writer.scalars(step, {f"train/{name}": value for name, value in values.items()})
        progress.show(step, figures.text, log)

        evaluating = last or (config.train.eval_every and step % config.train.eval_every == 0)
        if not (evaluating or step % config.train.checkpoint_every == 0):
            continue
        start = time.monotonic()
        figures.check_finite(step)
        headline = None
        if evaluating:
            scores = evaluation(state)
            headline = {name: scores[name] for name in evaluate.HEADLINE}
            progress.say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in headline.items()))
        saved.save(state, step * config.train.batch_size, config, headline)
        progress.pause(time.monotonic() - start)
        figures.restart()
    saved.wait()
    return scores or evaluation(state)  # a finished run, started again, only evaluates


def device_batches(config, records, position: int, count: int, mesh) -> Generator[dict, None, None]:
    """`count` global batches on the devices, from the image at `position` of the stream on."""
    start = position // config.train.batch_size
    names = ["image", "label"]
    names += ["valid"] if config.model.bn_padding == "masked" else []
    names += ["bad"] if config.data.bad_records == "mask" else []
    index, count_of_shares = sharding.share(mesh)
    iterator = pipeline.train_iterator(
        config.data,
        records,
        seed=config.seed,
        batch_size=config.train.batch_size,
        steps=start + count,
        start_step=start,
        process_index=index,
        process_count=count_of_shares,
    )
    try:
        for batch in iterator:
            yield sharding.to_devices({name: batch[name] for name in names}, mesh)
    except RuntimeError as error:
        raise pipeline.with_record(error, records) from error
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _first_state(config, workdir, spec, model, optimizer, saved, mesh) -> tuple[TrainState, int]:
    """The latest checkpoint's state, or a new one; and the images consumed so far."""

    def fresh(variables=None):
        return create_state(model, optimizer, config, variables)

    everywhere = sharding.replicated(mesh)
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
    elif config.init.checkpoint:
        variables = grafting.from_workdir(config.init.checkpoint, variables, config.model, spec)
    else:
        logging.warning("the backbone starts from scratch: init.weights is empty")
    return jax.jit(fresh, out_shardings=everywhere)(variables), 0


class _Evaluation:
    """Scores of a state on the evaluation split, written with their pictures."""

    def __init__(self, config, model, records, writer, workdir):
        self._config, self._records = config, records
        self._writer, self._workdir = writer, workdir
        self._evaluator = evaluate.Evaluator(
            model,
            records.spec,
            config.eval.batch_size,
            protocols.Protocol.from_config(config).planned(records.sizes()),
        )

    def __call__(self, state: TrainState) -> dict[str, Any]:
        step, spec, start = int(state.step), self._records.spec, time.monotonic()
        examples = pipeline.eval_examples(self._records, jax.process_index(), jax.process_count())
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
    logging.info("configuration:\n%s", config_lib.to_json(config))
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


def _next_commands(workdir: Path, saved: checkpoints.Checkpoints) -> str:
    return "\n".join(
        [
            f"best checkpoint  {saved.directory}/{saved.best_step()}",
            f"pictures         {workdir}/pictures",
            f"evaluate         python -m duc_dlc_jax.evaluate --workdir={workdir}",
            "predict          python -m duc_dlc_jax.predict "
            f"--model={workdir} --input=IMAGE_OR_FOLDER --output=predictions",
            f"export           python -m duc_dlc_jax.export --workdir={workdir} --output=BUNDLE",
            f"curves           tensorboard --logdir={workdir}",
        ]
    )
