"""The training step and the labelling of an image, timed on random pictures."""

from __future__ import annotations

import contextlib
import functools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax import protocols, sharding
from duc_dlc_jax.benchmark import floor, profile
from duc_dlc_jax.benchmark.peer import Peer
from duc_dlc_jax.benchmark.timing import WARM_UP, median_seconds
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.batches import device_batches
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import find_spec, open_records
from duc_dlc_jax.inference import Labeller
from duc_dlc_jax.models import counts, segmenter
from duc_dlc_jax.train_step import create_state, init_variables, make_train_step

Size = tuple[int, int]
SEED = np.uint32(0)


class Work:
    """What a benchmark of `config` needs once: network, variables, ceilings of the device.

    Raises ConfigError where the batch does not divide over the devices.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        size: Size | None = None,
        ceilings: floor.Ceilings | None = None,
    ):
        """size: of the images of inference; ceilings: measured if not given."""
        config_lib.validate(config)
        self.config, self.mesh = config, sharding.training_mesh(config)
        self.classes = find_spec(config.data).num_classes
        groups = sharding.bn_groups(config, self.mesh)
        self.model = segmenter.create(config.model, self.classes, groups)
        self.variables = init_variables(self.model, config.seed)
        self.crop: Size = config_lib.crop_shape(config.data)
        self.size = size or self.crop  # of inference
        self.ceilings = ceilings or floor.ceilings(config.model.dtype)

    def step(self, options: dict[str, Any] | None = None) -> Step:
        """The compiled training step on a random batch; options: of XLA, for this program."""
        data, schedule = random_batch(self.config, self.classes), 1000  # steps
        return Step(self.config, self.model, self.mesh, self.variables, data, schedule, options)

    def rates(self, what: str, seconds: list[float]) -> dict[str, Any]:
        """Images/s, FLOP/s and share of the floor of rounds that took `seconds` per call.

        FLOPs are 2 per multiply-add of the convolutions (`counts.macs`), 3 times that in
        training. Inference has the floor with BN folded into the convolutions as well.
        """
        training, median = what == "train", statistics.median(seconds)
        images = self.config.train.batch_size if training else 1
        size = self.crop if training else self.size
        flops = (6 if training else 2) * sum(counts.macs(self.model, *size).values())
        layers = floor.executed(self.model, *size)
        itemsize = np.dtype(self.model.dtype).itemsize
        devices = self.mesh.size if training else 1
        norms = floor.with_norm(layers, self.variables["batch_stats"])
        floor_of = functools.partial(
            floor.seconds,
            layers,
            batch=images // devices,
            itemsize=itemsize,
            ceilings=self.ceilings,
            training=training,
        )
        least, folded = floor_of(norms), sum(floor_of(()).values())
        return {
            "batch_size": images,
            "image": list(size),
            "seconds": median,
            "rounds": seconds,
            "images_per_second": images / median,
            "flop_per_second": flops * images / median,
            "floor_seconds": sum(least.values()),
            "floor_share": sum(least.values()) / median,
            "floor_by_group": least,
        } | ({} if training else {"folded_floor_seconds": folded})

    def setting(self) -> dict[str, Any]:
        return {
            "device": self.mesh.devices.flat[0].device_kind,
            "devices": self.mesh.size,
            "dtype": self.config.model.dtype,
            "classes": self.classes,
            "jax": jax.__version__,
            "ceilings": self.ceilings,
        }


def random_batch(config: ml_collections.ConfigDict, classes: int) -> dict[str, np.ndarray]:
    """A training batch of the configuration's sizes with random pixels, see `make_train_step`."""
    rng, batch = np.random.default_rng(0), config.train.batch_size
    size: Any = config_lib.crop_shape(config.data)
    image = rng.integers(0, 256, (batch, *size, 3)).astype(np.uint8)
    label = rng.integers(0, classes, image.shape[:3]).astype(np.uint8)
    return {"image": image, "label": label, "valid": np.tile(np.array(size, np.int32), (batch, 1))}


def time_train_step(config, model, mesh, variables, data, steps: int) -> tuple[float, int]:
    """Median seconds of `steps` training steps, and the bytes per device of one as compiled.

    With train.steps set it is the program that training runs: a compilation cache keeps it.
    """
    step = Step(config, model, mesh, variables, data, steps + WARM_UP)
    return median_seconds(step, steps), step.peak_bytes


class Step:
    """A compiled training step that goes on from its own state at each call."""

    def __init__(self, config, model, mesh, variables, data, steps: int, options: Any = None):
        optimizer = optimizers.create(config.optimizer, config.train.steps or steps)
        state = create_state(model, optimizer, config, variables)
        self._state = jax.device_put(state, sharding.replicated(mesh))
        self._data = sharding.to_devices(data, mesh)
        step = make_train_step(model, optimizer, config, [1] * model.num_classes)
        jitted = sharding.jit_train_step(step, mesh)
        start = time.perf_counter()
        self.compiled = jitted.lower(self._state, self._data, SEED).compile(options)
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = sharding.bytes_per_device(self.compiled)

    def __call__(self) -> Any:
        self._state, metrics = self.compiled(self._state, self._data, SEED)
        return metrics


class Labelling:
    """One image to train ids on one device, whole, as `predict` and `evaluate` do it.

    The image and the ids of a call are the host's.
    """

    def __init__(self, work: Work):
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
        grid, stride = work.model.resize_grid, work.model.logit_stride
        protocol = protocols.Protocol(grid=grid, logit_stride=stride)
        self._labeller = Labeller(work.model, protocol, mesh)
        variables = jax.device_put(work.variables, sharding.replicated(mesh))
        images = np.random.default_rng(0).integers(0, 256, (1, *work.size, 3), np.uint8)
        labels = np.full((1, *work.size), IGNORE, np.uint8)
        self._arguments = variables, images, labels, [work.size]
        start = time.perf_counter()
        self.compiled = self._labeller.compiled(*self._arguments)
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = sharding.bytes_per_device(self.compiled)

    def __call__(self) -> np.ndarray:
        return np.asarray(self._labeller(*self._arguments)[1])


def timed_step(
    work: Work, step: Step | Labelling, steps: int, rounds: int, what: str = "train"
) -> dict[str, Any]:
    """Rates, memory and seconds of compilation of a program, over `rounds` of `steps` calls."""
    _round(step, 1)
    _round(step, steps)
    seconds = [_round(step, steps) for _ in range(rounds)]
    return work.rates(what, seconds) | {
        "peak_bytes_per_device": step.peak_bytes,
        "compile_seconds": step.compile_seconds,
    }


def _round(call: Callable[[], Any], steps: int) -> float:
    """Seconds per call of `steps`, the last of which is waited for."""
    start = time.perf_counter()
    for _ in range(steps):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / steps


def profiled(work: Work, step: Step | Labelling) -> dict[str, Any]:
    """Where the time of a call goes, by layer group, forward and backward, from a profile."""
    times = profile.trace(step, 3)
    names = profile.instructions(step.compiled.as_text())
    return {
        "profile": profile.by_group(times, names, work.variables["params"]),
        "slowest": profile.slowest(times, names, 40),
    }


def beside_peer(
    peer: Peer, what: str, step: Step | Labelling, way: str, steps: int, rounds: int
) -> dict[str, Any]:
    """PyTorch's training or labelling in one of its ways, in rounds that alternate with ours.

    {median seconds, its rounds and ours, their ratios pair by pair, the form of g(I), PyTorch's
    most bytes}, or {failed: why}.
    """
    try:
        guidance = peer.prepare(what, way)
        pairs = [(_round(step, steps), peer.seconds(steps)) for _ in range(rounds)]
    except ConfigError as error:
        return {"failed": str(error)}
    ours, theirs = (list(seconds) for seconds in zip(*pairs, strict=True))
    return {
        "seconds": statistics.median(theirs),
        "rounds": theirs,
        "ours": ours,
        "ratios": [t / o for o, t in pairs],
        "guidance": guidance,
        "peak_bytes": peer.peak_bytes,
    }


def evaluation(config: ml_collections.ConfigDict, size: tuple[int, int], steps: int = 1) -> dict:
    """Seconds to label one image of `size` by config.eval on one device, and the peak memory.

    The memory is that of the whole process since its start, compilation and all, in bytes; on an
    accelerator also the most of its memory in use.
    """
    config_lib.validate(config)
    protocol = protocols.Protocol.from_config(config)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    model = segmenter.create(config.model, find_spec(config.data).num_classes)
    variables = jax.device_put(init_variables(model, config.seed), sharding.replicated(mesh))
    labeller, padded = Labeller(model, protocol, mesh), protocol.padded_size(size)
    images = np.random.default_rng(0).integers(0, 256, (1, *padded, 3), np.uint8)
    labels = np.full((1, *padded), IGNORE, np.uint8)
    seconds = median_seconds(lambda: labeller(variables, images, labels, [size]), steps, 1)
    device = mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "image": list(size),
        "classes": model.num_classes,
        "protocol": protocol.sentence(),
        "seconds": seconds,
        "images_per_second": 1 / seconds,
        "programs": labeller.programs(),
        "peak_process_bytes": peak_memory(),
        "peak_device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def peak_memory() -> int:
    """Bytes of the most memory this process had (on Linux: getrusage would count its parent's)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fed(config: ml_collections.ConfigDict, steps: int, rounds: int = 5) -> dict[str, Any]:
    """Images/s of `config`'s training on prepared records, and with one batch kept on the devices.

    Alternating rounds of `steps` steps of the same compiled program; medians and their ratio, by
    the clock and by this process's CPU time (which other programs on the machine do not disturb).
    """
    config_lib.validate(config)
    mesh = sharding.training_mesh(config)
    records = open_records(config.data, config.data.train_split)
    groups = sharding.bn_groups(config, mesh)
    model = segmenter.create(config.model, records.spec.num_classes, groups)
    optimizer = optimizers.create(config.optimizer, 2 * (rounds + 1) * steps)
    state = create_state(model, optimizer, config, init_variables(model, config.seed))
    state = jax.device_put(state, sharding.replicated(mesh))
    train_step = make_train_step(model, optimizer, config, records.pixels())
    step = sharding.jit_train_step(train_step, mesh)
    batches = device_batches(config, records, 0, (rounds + 1) * steps + 1, mesh)
    kept, _ = next(batches)
    seconds: dict[str, list[float]] = {"records": [], "one_batch": []}
    cpu: dict[str, list[float]] = {"records": [], "one_batch": []}
    with contextlib.closing(batches):
        for _ in range(rounds + 1):
            for source, times in seconds.items():
                start, used = time.perf_counter(), time.process_time()
                for _ in range(steps):
                    batch = next(batches)[0] if source == "records" else kept
                    state, metrics = step(state, batch, SEED)
                jax.block_until_ready((state, metrics))
                times.append(time.perf_counter() - start)
                cpu[source].append(time.process_time() - used)
    images = steps * config.train.batch_size
    rates = {  # the first round compiles
        source: [images / t for t in times[1:]] for source, times in seconds.items()
    }
    medians = {source: statistics.median(values) for source, values in rates.items()}
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "images_per_second": medians,
        "rounds": rates,
        "ratio": medians["records"] / medians["one_batch"],
        "cpu_ratio": statistics.median(cpu["one_batch"][1:])
        / statistics.median(cpu["records"][1:]),
    }
