"""The device mesh: the batch is split over the axis `data`, the rows of an image over `space`.

The train state is on every device. XLA's partitioner exchanges the rows that convolutions read
across the border of two devices, and sums what a batch normalisation or the loss needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duc_dlc_jax.config import ConfigError

GRID = 8  # rows of the image to a cell of the finest grid that DUC and DLC work on


def make_mesh(data: int = -1, space: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x space devices (default: of all devices of all processes).

    data = -1 takes what `space` leaves. Devices of one process are neighbours, those of one image
    next to each other.

    Raises ConfigError, with the arithmetic, where the axes do not fit the devices or an image's
    devices would lie partly in one process and partly in another that has images of its own.
    """
    found = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    total = len(found)
    if space < 1 or data == 0 or data < -1:
        raise ConfigError(
            f"mesh.data={data}, mesh.space={space}; both count devices, -1 = the rest"
        )
    if data == -1 and total % space:
        fit = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise ConfigError(
            f"mesh.space={space} does not divide {total} devices ({total} = {total // space} x "
            f"{space} + {total % space}); use one of {fit}"
        )
    if data not in (-1, total // space):
        raise ConfigError(
            f"mesh.data={data} x mesh.space={space} = {data * space}, and there are {total} "
            f"devices; use mesh.data=-1 for what mesh.space leaves"
        )
    local = total // len({d.process_index for d in found})
    if local % space and space % local:
        raise ConfigError(
            f"mesh.space={space} does not fit processes of {local} devices: one of the two must "
            "be a multiple of the other"
        )
    return Mesh(np.asarray(found).reshape(-1, space), ("data", "space"))


def training_mesh(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`, checked against the batch and the crop; raises ConfigError."""
    mesh = make_mesh(config.mesh.data, config.mesh.space, devices)
    check_batch(config.train.batch_size, mesh.shape["data"], config.train.accumulate)
    check_rows(config.data.crop_size, mesh.shape["space"])
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Axis 0 split over `data`; of images and label maps (ndim > 2) the rows over `space`."""
    return NamedSharding(mesh, PartitionSpec("data", *["space"] * (ndim > 2)))


def share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch this process reads, and of how many: (index, count).

    Processes whose devices hold parts of the same images read the same share.
    """
    mine = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    rows = np.flatnonzero(np.reshape(mine, mesh.devices.shape).any(axis=1))
    return int(rows[0]) // len(rows), mesh.shape["data"] // len(rows)


def bn_groups(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """In how many parts, each by itself, a batch is normalised; see `layers.BatchNorm`."""
    parts = {"global": 1, "host": share(mesh)[1], "device": mesh.shape["data"]}
    return parts[config.model.bn_groups]


def check_batch(batch_size: int, devices: int, accumulate: int = 1) -> None:
    """Raises ConfigError, with the arithmetic, unless the batch divides over devices and parts.

    devices: size of the axis `data`; accumulate: parts of a batch, `train.accumulate`.
    """
    each = devices * accumulate
    whole, rest = divmod(batch_size, each)
    if rest or whole == 0:
        near = [n for n in (whole * each, (whole + 1) * each) if n]
        over, product = f"{devices} devices", f"{devices}"
        if accumulate > 1:
            over += f" x train.accumulate={accumulate} parts"
            product += f" x {accumulate}"
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide over {over} "
            f"({batch_size} = {whole} x {product} + {rest}); use {' or '.join(map(str, near))}"
        )


def check_rows(height: int, space: int) -> None:
    """Raises ConfigError, with the arithmetic, unless each device has whole cells of the 1/8 grid.

    Of coarser grids the partitioner pads what does not divide.
    """
    step = GRID * space
    if space > 1 and height % step:
        near = [n for n in (height // step * step, -(-height // step) * step) if n]
        raise ConfigError(
            f"crops of {height} rows do not divide over mesh.space={space} devices in multiples "
            f"of {GRID} rows ({height} = {height // step} x {step} + {height % step}); use "
            f"data.crop_size={' or '.join(map(str, near))}"
        )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch -> global arrays, shares in the order of the mesh."""
    index, count = share(mesh)

    def place(local: np.ndarray) -> jax.Array:
        first = index * len(local)

        def part(slices: Any) -> np.ndarray:
            rows = slices[0].indices(count * len(local))
            return local[(slice(rows[0] - first, rows[1] - first), *slices[1:])]

        shape = (count * len(local), *local.shape[1:])
        return jax.make_array_from_callback(shape, batched(mesh, local.ndim), part)

    return {name: place(value) for name, value in batch.items()}


def jit_train_step(train_step: Callable, mesh: Mesh) -> Any:
    """(state, batch as `to_devices` places it, seed) -> (state, metrics): one program of the mesh.

    It serves every seed, an np.uint32. Donates the state.
    """
    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, None, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def shapes(tree: Any, where: jax.sharding.Sharding) -> Any:
    """Arrays, or what stands for them -> ShapeDtypeStructs placed there."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def local_copy(tree, mesh: Mesh):
    """A replicated tree of global arrays -> the same values on a mesh of this process's devices."""
    sharding = replicated(mesh)

    def copy(x: jax.Array) -> jax.Array:
        shards = {s.device: s.data for s in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shards[d] for d in mesh.devices.flat]
        )

    return jax.tree.map(copy, tree)


def bytes_per_device(compiled: Any) -> int:
    """Memory that a compiled program needs on each device: arguments, results and temporaries.

    What is donated counts once.
    """
    memory: Any = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(used - memory.alias_size_in_bytes)
