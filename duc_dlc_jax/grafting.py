"""A trained network as the start of another: the same parts are taken, classes matched by name.

`config.init.checkpoint` starts a training with it, `duc_dlc_jax.surgery classes` writes it down.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import flax
import jax
import ml_collections
import numpy as np
from absl import logging

from duc_dlc_jax import workdirs
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.models.registry import CLASSIFYING

CLASSIFIERS = ("classifier", "aux_classifier")  # their last axis is the train ids
MEANING = ("stem", "stride_on", "bn_epsilon")  # of config.model: no shape would betray them


@dataclasses.dataclass(frozen=True)
class Grafted:
    """Variables of the new network; paths are "params/duc/low_conv/kernel"."""

    variables: dict[str, Any]
    taken: tuple[str, ...]
    drawn: tuple[str, ...]  # of the new network, absent from the old one
    dropped: tuple[str, ...]  # of the old network, absent from the new one
    classes: tuple[str, ...]  # whose classifier weights were taken
    new_classes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for a log, one string a line."""
        return [
            f"  taken: {len(self.taken)} arrays",
            f"  drawn anew: {_listed(self.drawn)}",
            f"  left behind: {_listed(self.dropped)}",
            f"  classes with trained weights: {_listed(self.classes)}",
            f"  classes drawn anew: {_listed(self.new_classes)}",
        ]


def graft(
    fresh: dict[str, Any], trained: dict[str, Any], old: LabelSpec, new: LabelSpec
) -> Grafted:
    """The `fresh` {params, batch_stats} with the parts that `trained` has too.

    An array of the classifiers is taken class by class, by name; a new class keeps its fresh
    numbers. All other arrays have to have equal shapes.

    Raises ConfigError where they do not, naming the first.
    """
    ours, theirs = flat(fresh), flat(trained)
    pairs = [
        (new.classes.index(name), old.classes.index(name))
        for name in new.classes
        if name in old.classes
    ]
    result, taken = {}, []
    for path, value in ours.items():
        part = path.split("/")[1]
        source = theirs.get(path)
        if part in CLASSIFYING and old.classes != new.classes:
            source = None  # it mixes the classes
        if source is None:
            result[path] = value
            continue
        if part in CLASSIFIERS:
            if source.shape[:-1] != value.shape[:-1]:
                raise _mismatch(path, source, value)
            value = np.array(value)
            for here, there in pairs:
                value[..., here] = source[..., there]
        elif source.shape != value.shape:
            raise _mismatch(path, source, value)
        else:
            value = np.asarray(source, value.dtype)
        result[path] = value
        taken.append(path)
    common = tuple(name for name in new.classes if name in old.classes)
    return Grafted(
        flax.traverse_util.unflatten_dict(result, sep="/"),
        tuple(taken),
        tuple(path for path in ours if path not in taken),
        tuple(path for path in theirs if path not in taken),
        common,
        tuple(name for name in new.classes if name not in common),
    )


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of arrays -> arrays on the host by path, "params/duc/low_conv/kernel"."""
    return dict(flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/"))


def from_workdir(
    workdir: str | os.PathLike,
    fresh: dict[str, Any],
    model: ml_collections.ConfigDict,
    spec: LabelSpec,
) -> dict[str, Any]:
    """`graft` of a workdir's best network into the `fresh` variables of `config.model`; says what.

    Raises:
      FileNotFoundError: no such run.
      ConfigError: the networks differ in a shape, or in what the weights mean.
    """
    run = workdirs.load(os.path.expanduser(workdir))
    differ = {k: run.config.model[k] for k in model if model[k] != run.config.model[k]}
    meaning = [name for name in MEANING if name in differ]
    if meaning:
        wanted = " ".join(f"--config.model.{name}={differ[name]}" for name in meaning)
        raise ConfigError(f"the network in {workdir} belongs to other settings: set {wanted}")
    try:
        grafted = graft(fresh, run.variables, run.spec, spec)
    except ConfigError as error:
        fields = " ".join(f"--config.model.{name}={value}" for name, value in differ.items())
        raise ConfigError(f"{workdir}: {error}. It was trained with {fields}") from error
    logging.info("start: the network of step %d in %s", run.step, workdir)
    for line in grafted.lines():
        logging.info("%s", line)
    for name, value in differ.items():
        logging.warning(
            "%s was trained with model.%s=%r, now %r", workdir, name, value, model[name]
        )
    if not grafted.classes:
        logging.warning("no class of %s has the name of one of %s", spec.name, run.spec.name)
    return grafted.variables


def _mismatch(path: str, theirs: Any, ours: Any) -> ConfigError:
    return ConfigError(f"{path} has shape {theirs.shape} there and {ours.shape} here")


def _listed(names: tuple[str, ...], most: int = 8) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{rest}"
