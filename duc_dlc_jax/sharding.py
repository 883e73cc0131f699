"""The device mesh: the batch is split over the axis `data`, the train state is on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duc_dlc_jax.config import ConfigError


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """One axis, `data`, over the given devices (default: all, of all processes)."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, devices: int) -> None:
    """Raises ConfigError, with the arithmetic, unless batch_size is a multiple of the devices."""
    whole, rest = divmod(batch_size, devices)
    if rest or whole == 0:
        near = [n for n in (whole * devices, (whole + 1) * devices) if n]
        raise ConfigError(
            f"train.batch_size={batch_size} does not divide over {devices} devices "
            f"({batch_size} = {whole} x {devices} + {rest}); use {' or '.join(map(str, near))}"
        )


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, rows in the order of the processes."""
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def jit_train_step(train_step: Callable, mesh: Mesh) -> Any:
    """(state, batch) -> (state, metrics), one program over the mesh; donates the state."""
    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, batched(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )


def local_copy(tree, mesh: Mesh):
    """A replicated tree of global arrays -> the same values on a mesh of this process's devices."""
    sharding = replicated(mesh)

    def copy(x: jax.Array) -> jax.Array:
        shards = {s.device: s.data for s in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shards[d] for d in mesh.devices.flat]
        )

    return jax.tree.map(copy, tree)
