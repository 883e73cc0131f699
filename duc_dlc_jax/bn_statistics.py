"""BN statistics that belong to given parameters, estimated over training batches.

Averaged parameters are a network of their own: neither the statistics of one of the checkpoints nor
their average need fit it (Wu and Johnson, 2021, "precise batch norm").
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import flax
import jax
import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.grafting import flat
from duc_dlc_jax.models.segmenter import Segmenter


def estimate(
    model: Segmenter, variables: dict[str, Any], batches: Iterable[dict[str, jax.Array]]
) -> dict[str, Any]:
    """The `batch_stats` that normalise as the batches do: mean and variance over all of them.

    batches: as for training, `image` and with `bn_padding="masked"` `valid`; all of one size.
    Sums are float64 on the host. A frozen backbone keeps its statistics.

    Raises ConfigError for a network whose statistics are all frozen, and without a batch.
    """
    if model.bn_frozen:
        raise ConfigError(
            "model.bn_frozen=True: training kept the statistics, and every checkpoint has the same"
        )
    moments = _moments(cast(Any, model))  # linen modules can be hashed
    total: dict[str, np.ndarray] = {}
    count = 0
    for batch in batches:
        found = _wide(moments(variables, batch["image"], batch.get("valid")))
        for name, value in found.items():
            if name.endswith("/var"):
                value = value + found[name.removesuffix("var") + "mean"] ** 2
            total[name] = total.get(name, 0) + value
        count += 1
    if not count:
        raise ConfigError("BN statistics cannot be estimated without a training batch")
    result = {}
    for name, old in flat(variables["batch_stats"]).items():
        if model.backbone_frozen and name.startswith("backbone/"):
            result[name] = old
            continue
        value = total[name] / count
        if name.endswith("/var"):
            mean = total[name.removesuffix("var") + "mean"] / count
            value = np.maximum(value - mean**2, 0)
        result[name] = value.astype(old.dtype)
    return flax.traverse_util.unflatten_dict(result, sep="/")


@functools.cache
def _moments(model: Segmenter) -> Any:
    """(variables, image, valid) -> the batch's own statistics, jitted."""
    once = model.clone(bn_momentum=0.0)

    @jax.jit
    def moments(variables, image, valid):
        _, updated = once.apply(
            variables,
            image,
            train=True,
            coarse=True,
            valid=valid,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats", "intermediates"],
        )
        return updated["batch_stats"]

    return moments


def gap(stored: dict[str, Any], estimated: dict[str, Any]) -> tuple[float, str]:
    """How far two `batch_stats` are apart, and in which layer the most.

    Of a layer: the mean over its channels of |difference of the means| in standard deviations of
    `estimated`, plus |logarithm of the ratio of the standard deviations|. Near 0 where a network
    normalises as it does in training.
    """
    a, b = _wide(stored), _wide(estimated)
    worst = (0.0, "")
    for name in (name.removesuffix("/mean") for name in b if name.endswith("/mean")):
        std, other = (np.sqrt(x[f"{name}/var"] + 1e-5) for x in (b, a))
        moved = np.abs(a[f"{name}/mean"] - b[f"{name}/mean"]) / std
        worst = max(worst, (float((moved + np.abs(np.log(other / std))).mean()), name))
    return worst


def _wide(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in flat(tree).items()}
