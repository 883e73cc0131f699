"""A small data set on the devices, which cut its crops themselves (`data.on_device`).

The host draws what `pipeline` draws and sends, in place of pixels, the points of the images that a
crop shows: kilobytes. Labels are those of `transforms.cut` bit for bit. So are images up to
rounding: OpenCV and Pillow work in whole numbers, with coordinates in 32nds of a pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from duc_dlc_jax import sharding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.pipeline import Draw, Positions
from duc_dlc_jax.data.records import RecordError, Records
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.data.transforms import Augmentation, draw_geometry, shrinks, source_points

SHARE_OF_MEMORY = 0.5  # of a device that the images may take: the network needs the rest


def batches(
    data: Any, records: Records, positions: Positions, mesh: Mesh
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """Global batches as `pipeline.train_iterator` has them, on the devices of the mesh.

    data: `config.data`. With each come the records of this process's rows, int32 [b].

    Raises:
      ConfigError: the images take more than half of a device's memory.
      RecordError: a record cannot be read, and data.bad_records is "error".
    """
    arrays = upload(records, mesh, data.bad_records == "mask")
    augmentation, cut = Augmentation.from_config(data), _cutter(mesh)
    bad = np.asarray(arrays["bad"])
    for first in range(0, len(positions), positions.rows):
        drawn = [positions[i] for i in range(first, first + positions.rows)]
        rows = [_plan(draw, records.size(draw.record), augmentation) for draw in drawn]
        plan = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        plan["valid"][bad[plan["record"]]] = augmentation.crop
        yield cut(arrays, sharding.to_devices(plan, mesh)), plan["record"]


@functools.lru_cache(maxsize=1)
def upload(records: Records, mesh: Mesh, mask_bad: bool) -> dict[str, jax.Array]:
    """Decodes a split and puts it on every device of the mesh; kept for the next training.

    Returns image uint8 [N, H, W, 3] and label uint8 [N, H, W], filled up to the largest with black
    and 255; size int32 [N, 2] of each; bad bool [N]. Raises as `batches`.
    """
    sizes = np.array(records.sizes(), np.int32)
    height, width = sizes.max(axis=0).tolist()
    needed = 4 * len(records) * height * width
    _check_memory(needed, mesh, records)
    images = np.zeros((len(records), height, width, 3), np.uint8)
    labels = np.full(images.shape[:3], IGNORE, np.uint8)
    bad = np.zeros(len(records), bool)

    def read(index: int) -> None:
        try:
            example = records[index]
        except RecordError as error:
            if not mask_bad:
                raise
            logging.warning("masked: %s", error)
            bad[index] = True
            return
        inside = np.s_[index, : sizes[index][0], : sizes[index][1]]
        images[inside], labels[inside] = example["image"], example["label"]

    for _ in in_order(read, range(len(records))):
        pass
    logging.info("%d images are on each device: %.1f MiB", len(records), needed / 2**20)
    everywhere = sharding.replicated(mesh)
    arrays = {"image": images, "label": labels, "size": sizes, "bad": bad}
    return {
        name: jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)
        for name, array in arrays.items()
    }


def _check_memory(needed: int, mesh: Mesh, records: Records) -> None:
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    if limit and needed > SHARE_OF_MEMORY * limit:
        raise ConfigError(
            f"data.on_device=True: {len(records)} images of {records.folder}, {records.split}, "
            f"take {needed / 2**30:.1f} GiB on each device, more than {SHARE_OF_MEMORY:.0%} of its "
            f"{limit / 2**30:.1f} GiB. Use data.on_device=False with data.workers"
        )


def _plan(draw: Draw, size: tuple[int, int], config: Augmentation) -> dict[str, np.ndarray]:
    """What a device needs to cut one crop of C x D from an image of `size`.

    rows float32 [C], columns float32 [D]: where it samples, in pixel edges of the image; row_ids
    int32 [C], column_ids int32 [D]: the pixels with its labels, -1 outside; reach float32 [2]: of
    the filter, source pixels; record and valid as in a batch.
    """
    geometry = draw_geometry(draw.rng, size, config, draw.focus)
    flip = config.flip if geometry.flipped else "none"
    columns, rows = (p.ravel() for p in source_points(size, geometry, config.crop, flip))
    resized = geometry.height, geometry.width
    shrink = shrinks(size, geometry, config)
    reach = [max(n / m, 1) if shrink else 1 for n, m in zip(size, resized, strict=True)]
    plan = {
        "record": np.array(draw.record, np.int32),
        "valid": np.minimum(resized, config.crop).astype(np.int32),
        "reach": np.array(reach, np.float32),
    }
    for name, points, edge in (("row", rows, size[0]), ("column", columns, size[1])):
        ids = np.floor(points).astype(np.int32)
        plan[f"{name}_ids"] = np.where((ids >= 0) & (ids < edge), ids, -1)
        plan[f"{name}s"] = np.clip(points, 0.5, edge - 0.5).astype(np.float32)
    return plan


@functools.lru_cache(maxsize=4)
def _cutter(mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """(what `upload` returns, plans of a batch) -> {image, label, valid, bad} of the batch."""

    def cut(arrays, plan):
        record = plan["record"]
        image, label, size = (arrays[name][record] for name in ("image", "label", "size"))
        rows = _weights(plan["rows"], plan["reach"][:, 0], size[:, 0], image.shape[1])
        columns = _weights(plan["columns"], plan["reach"][:, 1], size[:, 1], image.shape[2])
        exact = jax.lax.Precision.HIGHEST
        pixels = jnp.einsum("bdw,bhwk->bhdk", columns, image.astype(jnp.float32), precision=exact)
        pixels = jnp.einsum("bch,bhdk->bcdk", rows, pixels, precision=exact)
        row_ids, column_ids = plan["row_ids"], plan["column_ids"]
        inside = (row_ids >= 0)[:, :, None] & (column_ids >= 0)[:, None]
        ids = jnp.take_along_axis(label, jnp.maximum(row_ids, 0)[:, :, None], 1)
        ids = jnp.take_along_axis(ids, jnp.maximum(column_ids, 0)[:, None], 2)
        pixels = jnp.where(inside[..., None], jnp.floor(pixels + 0.5), 0)
        batch = {
            "image": pixels.clip(0, 255).astype(jnp.uint8),
            "label": jnp.where(inside, ids, jnp.uint8(IGNORE)),
            "valid": plan["valid"],
            "bad": arrays["bad"][record],
        }
        return {
            name: jax.lax.with_sharding_constraint(value, sharding.batched(mesh, value.ndim))
            for name, value in batch.items()
        }

    return jax.jit(cut)


def _weights(points: jax.Array, reach: jax.Array, size: jax.Array, cells: int) -> jax.Array:
    """[B, n, cells]: weights of the pixels around points [B, n]; a triangle `reach` [B] wide.

    Pixels from `size` [B] on have none. A reach of 1 interpolates; Pillow's low-pass has the factor
    of the shrinking.
    """
    cell = jnp.arange(cells)[None, None]
    far = jnp.abs(cell + 0.5 - points[..., None]) / reach[:, None, None]
    weights = jnp.where(cell < size[:, None, None], jnp.maximum(1 - far, 0), 0)
    return weights / weights.sum(-1, keepdims=True)
