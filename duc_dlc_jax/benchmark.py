"""`python -m duc_dlc_jax.benchmark --what=model|input|train --config=configs/X.py`: speed.

model  the training step (all devices, donated state) and the labelling of one image of the crop
       size (one device) on random uint8 pictures, without decoding: medians after a warm-up
input  crops/s of one core from prepared records, beside PyTorch's DataLoader; --synthetic draws
       the images; --formats compares ways to store them instead
train  training steps fed by the input pipeline beside steps that get one batch again and again

With `--evaluate=1024x2048` it times instead how one image of this size is labelled by `--protocol`,
and says the most memory that the process had: start a process for each figure.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import (
    benchmark_formats,
    benchmark_input,
    cli,
    describe,
    predict,
    protocols,
    sharding,
)
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data import photos
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import find_spec, open_records
from duc_dlc_jax.inference import Labeller
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train_step import create_state, init_variables, make_train_step

WARM_UP = 2  # calls before the clock starts


def median_seconds(call: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> float:
    """Median wall time of `call`, whose result is waited for."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def benchmark(config: ml_collections.ConfigDict, steps: int = 5) -> dict[str, Any]:
    """Seconds, images/s and FLOP/s of `config` on the devices here; medians of `steps` calls.

    FLOPs are 2 per multiply-add of the convolutions (`describe.macs`), 3 times that in training.
    Raises ConfigError where the batch does not divide over the devices.
    """
    config_lib.validate(config)
    mesh = sharding.training_mesh(config)
    batch, size = config.train.batch_size, config_lib.crop_shape(config.data)
    classes = find_spec(config.data).num_classes
    model = segmenter.create(config.model, classes, sharding.bn_groups(config, mesh))
    flops = 2 * sum(describe.macs(model, *size).values())  # of one image, forward

    def rates(seconds: float, images: int, flops: int) -> dict[str, Any]:
        named = {"batch_size": images, "seconds": seconds, "images_per_second": images / seconds}
        return named | {"flop_per_second": flops * images / seconds}

    data = random_batch(config, classes)
    variables = init_variables(model, config.seed)
    label = predict.make_predictor(model, variables)
    inference = rates(median_seconds(lambda: label(data["image"][0]), steps), 1, flops)
    seconds, peak = time_train_step(config, model, mesh, variables, data, steps)
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "dtype": config.model.dtype,
        "image": list(size),
        "train": rates(seconds, batch, 3 * flops) | {"peak_bytes_per_device": peak},
        "inference": inference,
    }


def random_batch(config: ml_collections.ConfigDict, classes: int) -> dict[str, np.ndarray]:
    """A training batch of the configuration's sizes with random pixels, see `make_train_step`."""
    rng, batch = np.random.default_rng(0), config.train.batch_size
    size = config_lib.crop_shape(config.data)
    image = rng.integers(0, 256, (batch, *size, 3)).astype(np.uint8)
    label = rng.integers(0, classes, image.shape[:3]).astype(np.uint8)
    return {"image": image, "label": label, "valid": np.tile(np.array(size, np.int32), (batch, 1))}


def time_train_step(config, model, mesh, variables, data, steps: int) -> tuple[float, int]:
    """Median seconds of `steps` training steps, and the bytes per device of one as compiled.

    With train.steps set it is the program that training runs: a compilation cache keeps it.
    """
    optimizer = optimizers.create(config.optimizer, config.train.steps or steps + WARM_UP)
    state = jax.device_put(
        create_state(model, optimizer, config, variables), sharding.replicated(mesh)
    )
    data = {k: jax.device_put(x, sharding.batched(mesh, x.ndim)) for k, x in data.items()}
    jitted = sharding.jit_train_step(make_train_step(model, optimizer, config), mesh)
    compiled = jitted.lower(state, data).compile()

    def call():
        nonlocal state
        state, metrics = compiled(state, data)
        return state, metrics

    m: Any = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return median_seconds(call, steps), peak - m.alias_size_in_bytes


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
        "peak_process_bytes": _peak_memory(),
        "peak_device_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _peak_memory() -> int:
    """Bytes of the most memory this process had (on Linux: getrusage would count its parent's)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _print_evaluation(result: dict[str, Any]) -> None:
    print("{device}, image {image}, {classes} classes: {protocol}".format(**result))
    print("{seconds:.2f} s, {images_per_second:.3f} images/s; programs {programs}".format(**result))
    print(f"most memory of the process: {result['peak_process_bytes'] / 2**30:.2f} GiB")
    if result["peak_device_bytes"]:
        print(f"most memory of the device: {result['peak_device_bytes'] / 2**30:.2f} GiB")


def fed(config: ml_collections.ConfigDict, steps: int, rounds: int = 5) -> dict[str, Any]:
    """Images/s of `config`'s training on prepared records, and with one batch kept on the devices.

    Alternating rounds of `steps` steps of the same compiled program; medians and their ratio, by
    the clock and by this process's CPU time (which other programs on the machine do not disturb).
    """
    from duc_dlc_jax import train as training  # late: 150 MB that --evaluate would count

    config_lib.validate(config)
    mesh = sharding.training_mesh(config)
    records = open_records(config.data, config.data.train_split)
    model = segmenter.create(
        config.model, records.spec.num_classes, sharding.bn_groups(config, mesh)
    )
    optimizer = optimizers.create(config.optimizer, 2 * (rounds + 1) * steps)
    state = create_state(model, optimizer, config, init_variables(model, config.seed))
    state = jax.device_put(state, sharding.replicated(mesh))
    step = sharding.jit_train_step(make_train_step(model, optimizer, config), mesh)
    batches = training.device_batches(config, records, 0, (rounds + 1) * steps + 1, mesh)
    kept, _ = next(batches)
    seconds: dict[str, list[float]] = {"records": [], "one_batch": []}
    cpu: dict[str, list[float]] = {"records": [], "one_batch": []}
    with contextlib.closing(batches):
        for _ in range(rounds + 1):
            for source, times in seconds.items():
                start, used = time.perf_counter(), time.process_time()
                for _ in range(steps):
                    state, metrics = step(state, next(batches)[0] if source == "records" else kept)
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


def _print_model(result: dict[str, Any]) -> None:
    print("{devices} x {device}, {dtype}, images {image}".format(**result))
    for kind in ("train", "inference"):
        r = result[kind]
        speed = f"{r['images_per_second']:.1f} images/s, {r['flop_per_second'] / 1e12:.3f} TFLOP/s"
        print(f"{kind}, batch {r['batch_size']}: {1000 * r['seconds']:.1f} ms, {speed}")
    peak = result["train"]["peak_bytes_per_device"]
    print(f"memory of the training step: {peak / 2**20:,.0f} MiB per device")


def _print_fed(result: dict[str, Any]) -> None:
    rates = result["images_per_second"]
    print("{devices} x {device}".format(**result))
    print(f"fed by records {rates['records']:.1f} images/s, by one batch {rates['one_batch']:.1f}")
    print(f"ratio {result['ratio']:.3f}, by CPU time {result['cpu_ratio']:.3f}")


def _input(args: Any) -> dict[str, Any]:
    """Runs and prints `--what=input`."""
    conditions = benchmark_input.conditions()
    with tempfile.TemporaryDirectory() as folder:
        if args.formats:
            formats = benchmark_formats.compare(args.config, args.steps, args.seconds)
            result = {"formats": formats}
            benchmark_formats.show(formats)
        else:
            if args.synthetic:
                photos.prepare_photos(args.config.data.name, Path(folder), benchmark_input.IMAGES)
                args.config.data.dir, args.config.data.train_split = folder, "train"
            result = benchmark_input.compare(args.config, args.steps, args.seconds)
            benchmark_input.show(result)
    return result | conditions


def _evaluation(args: Any) -> dict[str, Any]:
    """Runs and prints `--evaluate`."""
    height, x, width = args.evaluate.partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise config_lib.ConfigError(f"--evaluate={args.evaluate}; it is HEIGHTxWIDTH, 1024x2048")
    protocols.select(args.config, args.protocol, args.set)
    result = evaluation(args.config, (int(height), int(width)), args.steps)
    _print_evaluation(result)
    return result


def main(_) -> None:
    args = flags.FLAGS
    cli.use_deterministic_kernels(args.config)
    segmenter.enable_dtype(args.config.model)
    if args.evaluate:
        result = _evaluation(args)
    elif args.what == "input":
        result = _input(args)
    elif args.what == "train":
        result = fed(args.config, args.steps) | benchmark_input.conditions()
        _print_fed(result)
    else:
        result = benchmark(args.config, args.steps)
        _print_model(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
    flags.DEFINE_enum("what", "model", ["model", "input", "train"], "What is timed.")
    flags.DEFINE_integer(
        "steps", 5, "Timed calls, rounds with --what=input, steps of a round with --what=train.", 1
    )
    flags.DEFINE_float("seconds", 4.0, "Of a round with --what=input.", 0.0)
    flags.DEFINE_bool("synthetic", False, "With --what=input: draw images like the data set's.")
    flags.DEFINE_bool("formats", False, "With --what=input: ways to store a 2048x1024 image.")
    flags.DEFINE_string("evaluate", "", "Time the labelling of an image of HEIGHTxWIDTH instead.")
    protocols.define_flags()
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
