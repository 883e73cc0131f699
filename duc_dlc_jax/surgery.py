"""Checkpoints, looked into and rebuilt: `python -m duc_dlc_jax.surgery COMMAND --workdir=DIR ...`.

show     [--batches=N]                      what a checkpoint holds; whether its BN statistics fit
diff     --other=DIR                        every array that differs from another run's, by how much
average  --output=DIR --last=K              the mean of the last K checkpoints' parameters
ema      --output=DIR                       the averaged network alone
classes  --output=DIR --labels=NAME_OR_FILE another list of classes, the rest kept

--checkpoint (and --other_checkpoint): best, latest or a step. What is written to --output is a
workdir that `evaluate`, `predict` and `main` take.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from duc_dlc_jax import bn_statistics, checkpoints, cli, grafting, sharding, storage, workdirs
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import labels
from duc_dlc_jax.data.batches import device_batches
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.progress import shown
from duc_dlc_jax.train_step import TrainState, first_state, init_variables, state_shapes

CHECK_SHARE = 4  # of the batches that estimate, one in so many more checks the result


def show(
    workdir: epath.Path, checkpoint: str = "best", batches: int = 0, data_dir: str = ""
) -> list[str]:
    """What a checkpoint holds, as lines; with `batches` how far its BN statistics are from those
    of so many training batches (`bn_statistics.gap`).

    Raises as `workdirs.load`; with `batches` also where the data are not prepared.
    """
    run = workdirs.load(workdir, checkpoint)
    with checkpoints.Checkpoints(workdir) as saved:
        arrays, scores = saved.arrays(run.step), saved.scores(run.step)
        position, steps = saved.position(run.step), saved.steps()
    lines = [
        f"{workdir}: step {run.step} of {', '.join(map(str, steps))}; {position} images consumed",
        f"classes    {run.spec.num_classes} of {run.spec.name}: {', '.join(run.spec.classes)}",
        "scores     " + (", ".join(f"{k} {v:.4f}" for k, v in scores.items()) or "not evaluated"),
        f"average    {'an EMA, which evaluation takes' if _has_ema(arrays) else 'none'}",
        f"{'part':<40}{'arrays':>8}{'numbers':>14}{'norm':>14}{'not finite':>12}",
    ]
    parts: dict[str, list[np.ndarray]] = {}
    for path, value in arrays.items():
        depth = 2 if path.startswith(("params/", "batch_stats/")) else 1
        parts.setdefault("/".join(path.split("/")[:depth]), []).append(value)
    for part, values in parts.items():
        numbers = [np.asarray(v, np.float64) for v in values]
        norm = math.sqrt(sum(float((v * v).sum()) for v in numbers))
        odd = sum(int((~np.isfinite(v)).sum()) for v in numbers)
        size = sum(v.size for v in values)
        lines.append(f"{part:<40}{len(values):>8}{size:>14,}{norm:>14.4g}{odd:>12,}")
    if batches:
        data = training_batches(run.config, 0, batches, data_dir)
        estimated = bn_statistics.estimate(run.model, run.variables, data)
        lines.append(_fit(run.variables["batch_stats"], estimated, batches))
    return lines


def _fit(stored: Any, estimated: Any, batches: int) -> str:
    value, layer = bn_statistics.gap(stored, estimated)
    return (
        f"BN statistics are off by {value:.3f} standard deviations, at most, in {layer} "
        f"({batches} training batches)"
    )


def diff(
    workdir: epath.Path, other: epath.Path, checkpoint: str = "best", other_checkpoint: str = "best"
) -> list[str]:
    """Lines about everything in which two checkpoints differ; none where they are equal.

    The step and the optimizer's state count too; fields of the configuration and classes are
    compared as they stand beside the checkpoints.
    """
    first, second = (
        workdirs.load(*pair) for pair in ((workdir, checkpoint), (other, other_checkpoint))
    )
    lines = []
    if first.spec != second.spec:
        lines.append(f"labels: {first.spec.name} and {second.spec.name} differ")
    old, new = (dict(config_lib.fields(run.config)) for run in (first, second))
    lines += [f"config.{k}: {old[k]!r} and {new[k]!r}" for k in old if old[k] != new[k]]
    with checkpoints.Checkpoints(workdir) as saved:
        ours = saved.arrays(first.step)
    with checkpoints.Checkpoints(other) as saved:
        theirs = saved.arrays(second.step)
    lines += [f"{path}: only in {workdir}" for path in ours if path not in theirs]
    lines += [f"{path}: only in {other}" for path in theirs if path not in ours]
    for path in ours:
        if path not in theirs:
            continue
        a, b = ours[path], theirs[path]
        if a.shape != b.shape:
            lines.append(f"{path}: shapes {a.shape} and {b.shape}")
        elif not np.array_equal(a, b, equal_nan=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            most = np.abs(a - b).max()
            lines.append(f"{path}: max |difference| {most:.3g}, max |value| {np.abs(a).max():.3g}")
    return lines


def average(
    workdir: epath.Path, output: epath.Path, last: int, how: str, batches: int, data_dir: str = ""
) -> list[str]:
    """Writes the mean of the last checkpoints' parameters; returns what was done, as lines.

    how: of the BN statistics: "estimate" over `batches` training batches, "average" of those of the
    checkpoints. The step, the images consumed and the optimizer's state are the latest's.

    Raises ConfigError where there are fewer checkpoints; as `bn_statistics.estimate`.
    """
    workdirs.check_new(output, "--output")
    config, spec, model = workdirs.description(workdir)
    with checkpoints.Checkpoints(workdir) as saved:
        steps = saved.steps()[-last:]
        if len(steps) < last or last < 1:
            raise ConfigError(
                f"--last={last}: {workdir} has {len(saved.steps())} checkpoints; training keeps "
                "train.keep_latest of them"
            )
        like = _like(config, model)
        total: dict[str, Any] = {}
        for step in steps:
            state, position = saved.restore(step, like)
            found = jax.tree.map(
                lambda x: np.asarray(x, np.float64) / len(steps),
                {"params": state.params, "batch_stats": state.batch_stats},
            )
            total = jax.tree.map(np.add, total, found) if total else found
    variables = jax.tree.map(
        lambda mean, x: jnp.asarray(mean, x.dtype),
        total,
        {"params": state.params, "batch_stats": state.batch_stats},
    )
    lines = [f"parameters: the mean of steps {', '.join(map(str, steps))}"]
    if how == "average":
        lines.append("BN statistics: the mean of the checkpoints', not compared with data")
    else:
        checked = max(batches // CHECK_SHARE, 1)
        data = training_batches(config, 0, batches, data_dir)
        estimated = bn_statistics.estimate(model, variables, data)
        fresh = training_batches(config, batches, checked, data_dir)
        own = bn_statistics.estimate(model, variables, fresh)
        lines.append(f"BN statistics: estimated over {batches} training batches")
        lines.append(f"  of the latest checkpoint: {_fit(state.batch_stats, own, checked)}")
        lines.append(f"  as written:               {_fit(estimated, own, checked)}")
        variables["batch_stats"] = estimated
    workdirs.create(output, config, spec, _with(state, variables), position)
    return lines


def ema(workdir: epath.Path, output: epath.Path, checkpoint: str = "best") -> list[str]:
    """Writes the network that the run averaged, parameters and BN statistics, as its own.

    Raises ConfigError where it kept no average.
    """
    workdirs.check_new(output, "--output")
    config, spec, model = workdirs.description(workdir)
    if not config.optimizer.ema_decay:
        raise ConfigError(f"{workdir} kept no average: optimizer.ema_decay is 0")
    with checkpoints.Checkpoints(workdir) as saved:
        step = saved.named_step(checkpoint)
        state, position = saved.restore(step, _like(config, model))
    workdirs.create(output, config, spec, _with(state, state.ema), position)
    return [f"parameters and BN statistics: the average of step {step}"]


def classes(
    workdir: epath.Path, output: epath.Path, spec: labels.LabelSpec, checkpoint: str = "best"
) -> list[str]:
    """Writes the network with the classes of `spec`, at step 0; classes of the same name keep their
    weights, the other ones are drawn from config.seed.
    """
    workdirs.check_new(output, "--output")
    run = workdirs.load(workdir, checkpoint)
    config = run.config
    config.data.name = spec.name
    model = segmenter.create(config.model, spec.num_classes)
    grafted = grafting.graft(init_variables(model, config.seed), run.variables, run.spec, spec)
    variables = jax.tree.map(jnp.asarray, grafted.variables)
    workdirs.create(output, config, spec, first_state(model, config, variables))
    return [f"from step {run.step}:", *grafted.lines()]


def _like(config: ml_collections.ConfigDict, model: segmenter.Segmenter) -> TrainState:
    """The structure of the run's train state, on every device."""
    everywhere = sharding.replicated(sharding.make_mesh())
    return sharding.shapes(state_shapes(model, config), everywhere)


def _with(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """The state with other variables, which also become its average if it has one."""
    average = jax.tree.map(jnp.copy, variables) if state.ema else {}
    return dataclasses.replace(state, **variables, ema=average)


def _has_ema(arrays: dict[str, np.ndarray]) -> bool:
    return any(path.startswith("ema/") for path in arrays)


def training_batches(
    config: ml_collections.ConfigDict, first: int, count: int, data_dir: str = ""
) -> Iterator[dict[str, jax.Array]]:
    """Batches of training from the `first` on, augmented as there, on all devices.

    data_dir: where the records are; "": in config.data.dir. Raises as `open_records`.
    """
    data = config.data.copy_and_resolve_references()
    data.dir = data_dir or data.dir
    records = open_records(data, data.train_split)
    mesh = sharding.make_mesh()
    sharding.check_batch(config.train.batch_size, mesh.size)
    position = first * config.train.batch_size
    batches = device_batches(config, records, position, count, mesh)
    return shown((batch for batch, _ in itertools.islice(batches, count)), count, "batch")


def main(argv: list[str]) -> None:
    args, commands = flags.FLAGS, ("show", "diff", "average", "ema", "classes")
    command = argv[1] if len(argv) == 2 else ""
    needed = {"diff": ["other"], "average": ["output", "last"], "ema": ["output"]}
    needed["classes"] = ["output", "labels"]
    if command not in commands:
        raise ConfigError(f"surgery {' '.join(argv[1:])}: one command of {', '.join(commands)}")
    if missing := [name for name in needed.get(command, []) if not args[name].value]:
        raise ConfigError(f"surgery {command} needs {' '.join(f'--{name}=' for name in missing)}")
    workdir, output = storage.path(args.workdir), storage.path(args.output or "")
    if command == "show":
        lines = show(workdir, args.checkpoint, args.batches or 0, args.data_dir)
    elif command == "diff":
        lines = diff(workdir, storage.path(args.other), args.checkpoint, args.other_checkpoint)
        print("\n".join(lines) or "equal")
        sys.exit(1 if lines else 0)
    elif command == "average":
        batches = args.batches or 100
        lines = average(workdir, output, args.last, args.statistics, batches, args.data_dir)
    elif command == "ema":
        lines = ema(workdir, output, args.checkpoint)
    else:
        lines = classes(workdir, output, labels.named_or_read(args.labels), args.checkpoint)
    print("\n".join(lines))
    if args.output:
        print(f"evaluate   python -m duc_dlc_jax.evaluate --workdir={shlex.quote(str(output))}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to look at or to take from.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    flags.DEFINE_string("output", "", "A new workdir for the result.")
    flags.DEFINE_string("other", "", "diff: the run to compare with.")
    flags.DEFINE_string("other_checkpoint", "best", "diff: best, latest or a step.")
    flags.DEFINE_integer("last", 0, "average: so many checkpoints.", lower_bound=0)
    flags.DEFINE_enum("statistics", "estimate", ["estimate", "average"], "average: BN statistics.")
    flags.DEFINE_integer("batches", None, "average (100), show (0): training batches.", 1)
    flags.DEFINE_string("data_dir", "", "Where the records are; default: config.data.dir.")
    flags.DEFINE_string("labels", "", "classes: a data set's name or a labels.json.")
    cli.run(main)
