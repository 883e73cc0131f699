"""Batches of training on the devices: the split that a mesh wants, from wherever images live."""

from __future__ import annotations

import math
from collections.abc import Generator

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from duc_dlc_jax import sharding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import pipeline, resident
from duc_dlc_jax.data.records import Records


def check_position(position: int, batch_size: int) -> None:
    """Raises ConfigError unless a batch begins at the image at `position` of the stream."""
    count, rest = divmod(position, batch_size)
    if rest:
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide the {position} images that the run has "
            f"seen ({position} = {count} x {batch_size} + {rest}); use "
            f"{math.gcd(position, batch_size)}, or the former size with train.accumulate"
        )


def device_batches(
    config: ml_collections.ConfigDict, records: Records, position: int, count: int, mesh: Mesh
) -> Generator[tuple[dict[str, jax.Array], np.ndarray], None, None]:
    """`count` global batches on the devices, from the image at `position` of the stream on.

    With each come the indices of the records that this process read, int32 [b].
    """
    start = position // config.train.batch_size
    names = ["image", "label"]
    names += ["valid"] if config.model.bn_padding == "masked" else []
    names += ["bad"] if config.data.bad_records == "mask" else []
    index, count_of_shares = sharding.share(mesh)
    if config.data.on_device:
        steps, size = range(start, start + count), config.train.batch_size
        share = index, count_of_shares
        positions = pipeline.Positions(config.data, records, config.seed, size, steps, *share)
        for cut, indices in resident.batches(config.data, records, positions, mesh):
            yield {name: cut[name] for name in names}, indices
        return
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
    # What workers share is given back at the end; of arrays on CPUs JAX may hold it longer.
    shared = config.data.workers and mesh.devices.flat[0].platform == "cpu"
    taken = np.array if shared else np.asarray

    def placed(batch):
        local = {name: taken(batch[name]) for name in names}
        return sharding.to_devices(local, mesh), np.array(batch["record"])

    batch = None
    try:
        for batch in iterator:
            yield placed(batch)
    except RuntimeError as error:
        raise pipeline.with_record(error, records) from error
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
        if config.data.workers:
            del batch, iterator
            pipeline.free_shared_memory()
