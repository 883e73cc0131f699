"""What a run leaves in its workdir, and how to take the trained network out of it.

config.json       the full configuration          labels.json   the label specification
checkpoints/STEP  Orbax checkpoints               metrics.jsonl every scalar, a line per write
parameters.txt    parameters by name and shape    pictures/     image | label | prediction
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import ml_collections
from etils import epath

from duc_dlc_jax import checkpoints, sharding, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import runtimes
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network: `model.apply(variables, images)` gives logits, `spec` has the classes.

    Of a bundle the model is called with images alone, and the configuration says its network, data
    set and evaluation split, and is the default elsewhere.
    """

    config: ml_collections.ConfigDict
    spec: LabelSpec
    model: Any  # a Segmenter, or of a bundle a BundleModel
    variables: dict[str, Any]  # {params, batch_stats}, on every device; of a bundle {}
    step: int
    workdir: epath.Path


def write(workdir: epath.Path, config: ml_collections.ConfigDict, spec: LabelSpec) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config_lib.to_json(config) + "\n")
    (workdir / "labels.json").write_text(spec.to_json() + "\n")


def check_new(workdir: epath.Path, flag: str) -> None:
    """Raises ConfigError where a run is already, and where nothing can be written."""
    storage.check(workdir, write=True, flag=flag)
    for name in ("config.json", "checkpoints"):
        if (workdir / name).exists():
            raise config_lib.ConfigError(
                f"{workdir} holds a run already ({workdir / name}); give another folder"
            )


def create(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    spec: LabelSpec,
    state: TrainState,
    position: int = 0,
) -> None:
    """A workdir with one checkpoint, of `state`, as if training had written it.

    position: training images consumed. config.json comes last: where it is, the rest is complete.
    """
    with checkpoints.Checkpoints(workdir) as saved:
        saved.save(state, position, config)
        saved.wait()
    write(workdir, config, spec)


def check_classes(workdir: epath.Path, spec: LabelSpec) -> None:
    """Raises ConfigError unless a run's classes are those of `spec`, in the same order.

    The ids that mean them in masks may differ: data prepared anew may have others.
    """
    path = workdir / "labels.json"
    trained = LabelSpec.from_json(path.read_text()).classes if path.exists() else spec.classes
    if trained != spec.classes:
        raise config_lib.ConfigError(
            f"the network in {workdir} was trained to label {', '.join(trained)}; the classes of "
            f"{spec.name} are {', '.join(spec.classes)}. Give another workdir; to start from that "
            f"network, with classes matched by name: --config.init.checkpoint={workdir}"
        )


def changed_fields(workdir: epath.Path, config: ml_collections.ConfigDict) -> dict[str, tuple]:
    """Fields whose value differs from the one the workdir was last trained with: (old, new)."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    saved = located(config_lib.from_json(path.read_text()))
    old, new = (dict(config_lib.fields(c)) for c in (saved, located(config)))
    return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


def located(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config` with init.checkpoint as an absolute path, for commands in other folders."""
    config = config.copy_and_resolve_references()
    if config.init.checkpoint:
        start = storage.path(config.init.checkpoint).expanduser()
        config.init.checkpoint = str(storage.absolute(start))
    return config


def start_of(workdir: epath.Path, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.init` as the run in the workdir began; `config` may leave it out, not change it.

    Raises ConfigError where it names another start: a run goes on from its checkpoint.
    """
    path = workdir / "config.json"
    began = located(config_lib.from_json(path.read_text())).init if path.exists() else config.init
    if not (config.init.weights or config.init.checkpoint):
        return began
    for name, new in located(config).init.items():
        if (old := began[name]) != new:
            raise config_lib.ConfigError(
                f"the run in {workdir} began with init.{name}={old!r}, not {new!r}, and goes on "
                "from its checkpoint: leave config.init out, or give another workdir"
            )
    return began


def description(
    workdir: epath.Path,
) -> tuple[ml_collections.ConfigDict, LabelSpec, segmenter.Segmenter]:
    """Configuration, classes and network of a run.

    Raises FileNotFoundError for a folder that is no workdir, ConfigError for an object store that
    cannot be used.
    """
    storage.check(workdir)
    for name in ("config.json", "labels.json", "checkpoints"):
        if not (workdir / name).exists():
            raise FileNotFoundError(
                f"{workdir} is not the workdir of a run: {workdir / name} is missing"
            )
    config = config_lib.from_json((workdir / "config.json").read_text())
    spec = LabelSpec.from_json((workdir / "labels.json").read_text())
    segmenter.enable_dtype(config.model)
    return config, spec, segmenter.create(config.model, spec.num_classes)


def load(workdir: str | os.PathLike, checkpoint: str = "best") -> Run:
    """The network of a workdir at checkpoint "best" (Final Score), "latest" or a step ("1000").

    Raises FileNotFoundError for a folder that is no workdir and for a checkpoint that is not there.
    """
    workdir = storage.path(workdir)
    config, spec, model = description(workdir)
    with checkpoints.Checkpoints(workdir) as saved:
        step = saved.named_step(checkpoint)
        everywhere = sharding.replicated(sharding.make_mesh())
        variables = saved.restore_variables(step, everywhere)
    return Run(config, spec, model, variables, step, workdir)


def load_any(path: str | os.PathLike, checkpoint: str = "best", form: str = "") -> Run:
    """The network of a workdir, or the model of a bundle in the format `form` ("": its first).

    Raises FileNotFoundError for a folder that is neither.
    """
    if not bundles.is_bundle(path):
        return load(path, checkpoint)
    bundle = bundles.read(path)
    training = bundle.manifest["training"]
    config = config_lib.from_json(json.dumps(training["config"]))
    model = runtimes.BundleModel(bundle, form)
    return Run(config, bundle.spec, model, {}, training["step"], epath.Path(bundle.path))
