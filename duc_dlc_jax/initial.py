"""Where a run starts: parameters drawn from its seed, then what is known better."""

from __future__ import annotations

import os
from typing import Any

import ml_collections
import numpy as np
from absl import logging
from etils import epath

from duc_dlc_jax import grafting
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import Records
from duc_dlc_jax.models import pretrained, tensor_files, weights
from duc_dlc_jax.models.alternatives.dupsampling import label_components
from duc_dlc_jax.models.segmenter import Segmenter
from duc_dlc_jax.train_step import init_variables

IMAGES = 100  # that label blocks come from, at most


def check(init: ml_collections.ConfigDict) -> None:
    """Raises ConfigError or FileNotFoundError where `init.weights` names no file that is read."""
    if init.weights:
        path, _ = weights.find(init.weights, init.source)
        tensor_files.check(path)


def check_not_itself(init: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises ConfigError where a run would start from its own workdir."""
    if init.checkpoint and os.path.realpath(init.checkpoint) == os.path.realpath(workdir):
        raise ConfigError(
            f"init.checkpoint={init.checkpoint} is the workdir itself. Without it the run goes on; "
            "to start a new one from its best network give another --workdir"
        )


def variables(
    model: Segmenter, config: ml_collections.ConfigDict, records: Records
) -> dict[str, Any]:
    """{params, batch_stats} on the host: a function of `config` and the training split alone.

    Raises what `pretrained.load_backbone` does for `config.init.weights`, and
    `grafting.from_workdir` for `config.init.checkpoint`.
    """
    start = init_variables(model, config.seed)
    if model.upsampling == "dupsampling" and config.init.dupsampling_blocks:
        start = _from_labels(start, model, config, records)
    if config.init.weights:
        params, batch_stats, _ = pretrained.load_backbone(
            config.init.weights,
            config.init.source,
            start["params"],
            start["batch_stats"],
            config.model,
        )
        return {"params": params, "batch_stats": batch_stats}
    if config.init.checkpoint:
        return grafting.from_workdir(config.init.checkpoint, start, config.model, records.spec)
    logging.warning("the backbone starts from scratch: init.weights is empty")
    return start


def _from_labels(start, model, config, records) -> dict[str, Any]:
    """`start` with the principal components of labels as DUpsampling's W."""
    count, side = config.init.dupsampling_blocks, model.output_stride
    kernel = np.array(start["params"]["dupsampling"]["w"]["kernel"])
    blocks = label_blocks(records, count, side, config.seed)
    components = label_components(blocks, model.num_classes, kernel.shape[2])
    kernel[0, 0, : len(components)] = side * components  # a cell of one class: scores around 1
    part = start["params"]["dupsampling"] | {"w": {"kernel": kernel}}
    return start | {"params": start["params"] | {"dupsampling": part}}


def label_blocks(records: Records, count: int, side: int, seed: int) -> np.ndarray:
    """Labels of `count` squares of `side` pixels of the split, uint8 [count, side, side].

    From up to `IMAGES` images, as many of each as it takes; what lies beyond an image is ignored.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = rng.permutation(len(records))[:IMAGES]
    blocks = np.full((count, side, side), IGNORE, np.uint8)
    for i, record in enumerate(chosen):
        label = records[int(record)]["label"]
        for block in blocks[i :: len(chosen)]:
            y, x = (int(rng.integers(max(n - side, 0) + 1)) for n in label.shape)
            part = label[y : y + side, x : x + side]
            block[: part.shape[0], : part.shape[1]] = part
    return blocks
