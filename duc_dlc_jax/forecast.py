"""What a training step will need on devices that are not here, from the program compiled for them.

`describe --devices=64` compiles for so many CPU devices: the partitioner's collectives alone are
the same as elsewhere. `describe --topology=v5e:4x4` compiles for a TPU slice with libtpu (the extra
`tpu`), which needs no TPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from duc_dlc_jax import collectives, programs, provenance, sharding, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train_step import make_train_step, state_shapes


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of an accelerator; the formula's constants."""

    name: str
    flops: float  # a second, bfloat16
    memory: float  # bytes
    memory_rate: float  # bytes a second
    link_rate: float  # bytes a second between chips, both directions together
    latency: float = 10e-6  # seconds a collective takes at least


CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 819e9, 400e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 1200e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1640e9, 800e9),
}
SHARE = 0.4  # of a chip's peak that convolutions with batch norm reach; published: 0.17 to 0.5


def on_cpu_devices(config: ml_collections.ConfigDict, count: int) -> dict[str, Any]:
    """FLOPs and collectives of a step on `count` devices; JAX must not have started yet."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return _compiled(config, jax.devices())


def on_topology(config: ml_collections.ConfigDict, name: str, effort: bool) -> dict[str, Any]:
    """The same on a TPU slice such as "v5e:4x4", with memory, time and efficiency.

    effort: compile as for running, which takes several times as long.

    Raises ConfigError for unknown chips, slices of no such form, and where libtpu is not installed.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise config_lib.ConfigError(f"--topology={name}; chips: {', '.join(CHIPS)}, as v5e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise config_lib.ConfigError(
            f"--topology={name}: its compiler comes with the extra tpu: "
            "pip install -c constraints.txt '.[tpu]'"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", {"v5e": "v5litepod-16"}.get(kind, f"{kind}-16"))
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # JAX has no narrower one
        raise config_lib.ConfigError(f"--topology={name}: {error}") from error
    found = _compiled(config, devices, None if effort else programs.QUICK_TPU)
    parts = config.train.accumulate
    return found | predicted(found, config.train.batch_size, CHIPS[kind], parts)


def lowered_step(config: ml_collections.ConfigDict, classes: int, mesh: Mesh) -> Any:
    """The training step of `config` over a mesh, traced for its batch and ready to compile."""
    model = segmenter.create(config.model, classes, sharding.bn_groups(config, mesh))
    optimizer = optimizers.create(config.optimizer, config.train.steps or 1000)
    size, batch = config_lib.crop_shape(config.data), config.train.batch_size

    def struct(shape: tuple[int, ...], dtype: Any, where: Any = None) -> jax.ShapeDtypeStruct:
        where = where or sharding.batched(mesh, len(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    everywhere = sharding.replicated(mesh)
    state = sharding.shapes(state_shapes(model, config), everywhere)
    # Labels are uint8 in records; a byte more is for class counts that no data set has.
    label = jnp.uint8 if classes <= IGNORE else jnp.uint16
    data = {"image": struct((batch, *size, 3), jnp.uint8), "label": struct((batch, *size), label)}
    if config.model.bn_padding == "masked":
        data["valid"] = struct((batch, 2), jnp.int32)
    step = make_train_step(model, optimizer, config, [1] * classes)
    return sharding.jit_train_step(step, mesh).lower(state, data, np.uint32(config.seed))


def _compiled(config, devices: Sequence[Any], options: dict | None = None) -> dict[str, Any]:
    mesh, start = sharding.training_mesh(config, devices), time.monotonic()
    compiled = lowered_step(config, find_spec(config.data).num_classes, mesh).compile(options)
    seconds = time.monotonic() - start
    memory, (flops, moved) = compiled.memory_analysis(), programs.cost(compiled)
    return {
        "mesh": dict(mesh.shape),
        "flops_per_device": flops,
        "bytes_accessed_per_device": moved,
        "collectives_per_device": collectives.totals(collectives.collectives(compiled.as_text())),
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "memory_bytes": sharding.bytes_per_device(compiled),
        "compile_seconds": seconds,
    }


def predicted(found: dict[str, Any], batch_size: int, chip: Chip, parts: int = 1) -> dict:
    """Memory, step time and efficiency from what `_compiled` found; see `text`.

    parts: `train.accumulate`, of which one is in memory.
    """
    need = found["memory_bytes"]
    rows = max(batch_size // (found["mesh"]["data"] * parts), 1)
    each = found["temporary_bytes"] / rows
    most = int((0.95 * chip.memory - found["state_bytes"]) // each)
    most *= found["mesh"]["data"] * parts
    work = max(
        found["flops_per_device"] / (SHARE * chip.flops),
        found["bytes_accessed_per_device"] / chip.memory_rate,
    )
    kinds = found["collectives_per_device"]
    moved = sum(row["bytes"] * (2 if kind == "all-reduce" else 1) for kind, row in kinds.items())
    count = sum(row["count"] for row in kinds.values())
    sent = moved / chip.link_rate + count * chip.latency
    return {
        "chip": dataclasses.asdict(chip) | {"share_of_peak": SHARE},
        "fits": need <= 0.95 * chip.memory,
        "largest_batch": max(most, 0),
        "seconds": {"work": work, "collectives": sent, "step": work + sent},
        "efficiency": work / (work + sent),
    }


def text(found: dict[str, Any]) -> str:
    """The figures for people, every constant of the formula with them."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    rows = [f"mesh {mesh}; per device and step:"]
    rows.append(f"  {found['flops_per_device'] / 1e9:,.2f} GFLOP")
    for kind, row in found["collectives_per_device"].items():
        rows.append(f"  {row['count']:4} {kind:<20} {row['bytes'] / 1e6:10.2f} MB")
    rows.append(f"  train state and batch {found['state_bytes'] / 1e9:.2f} GB")
    rows.append(f"  temporaries           {found['temporary_bytes'] / 1e9:.2f} GB")
    if "chip" in found:
        chip, seconds = found["chip"], found["seconds"]
        verdict = "fits" if found["fits"] else "does NOT fit"
        rows.append(
            f"{found['memory_bytes'] / 1e9:.2f} GB {verdict} {chip['name']} "
            f"({chip['memory'] / 1e9:.0f} GB, 5% left free); largest batch by temporaries per "
            f"image: about {found['largest_batch']}"
        )
        rows.append(
            f"predicted step {1e3 * seconds['step']:.1f} ms = work {1e3 * seconds['work']:.1f} + "
            f"collectives {1e3 * seconds['collectives']:.1f}, efficiency "
            f"{100 * found['efficiency']:.0f}%"
        )
        rows.append(
            "  work: the larger of FLOPs / "
            f"({chip['share_of_peak']:g} x {chip['flops'] / 1e12:.0f} TFLOP/s) and bytes / "
            f"{chip['memory_rate'] / 1e9:.0f} GB/s; collectives, none overlapped: all-reduces "
            f"twice and the others once at {chip['link_rate'] / 1e9:.0f} GB/s, and "
            f"{1e6 * chip['latency']:.0f} us each"
        )
    return "\n".join(rows)


def cached(config: ml_collections.ConfigDict, what: str, make: Callable[[], dict]) -> dict:
    """The result of `make`, kept by configuration, code and versions; the waiting is shown."""
    versions = [jax.__version__, provenance.version("libtpu"), provenance.sources()]
    key = json.dumps([config_lib.to_json(config), what, *versions])
    path = storage.cache_dir() / f"forecast-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    with _waiting(f"compiling for {what}"):
        found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


@contextlib.contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Says every 10 seconds for how long."""
    done, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(10):
            print(f"{text}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()
