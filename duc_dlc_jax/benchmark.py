"""`python -m duc_dlc_jax.benchmark --config=configs/X.py [--steps=5] [--json=FILE]`: speed.

Times the training step (all devices, donated state) and the labelling of one image of the crop size
(one device) on random uint8 pictures, without decoding: medians after a warm-up.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, describe, predict, sharding
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train_step import create_state, init_variables, make_train_step

WARM_UP = 2  # calls before the clock starts


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `call`, whose result is waited for."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def benchmark(config: ml_collections.ConfigDict, steps: int = 5) -> dict[str, Any]:
    """Seconds, images/s and FLOP/s of `config` on the devices here; medians of `steps` calls.

    FLOPs are 2 per multiply-add of the convolutions (`describe.macs`), 3 times that in training.
    Raises ConfigError where the batch does not divide over the devices.
    """
    config_lib.validate(config)
    mesh = sharding.data_mesh()
    batch, size = config.train.batch_size, config.data.crop_size
    sharding.check_batch(batch, mesh.size)
    classes = find_spec(config.data).num_classes
    model = segmenter.create(config.model, classes, mesh.size)
    flops = 2 * sum(describe.macs(model, size, size).values())  # of one image, forward

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
        "image": [size, size],
        "train": rates(seconds, batch, 3 * flops) | {"peak_bytes_per_device": peak},
        "inference": inference,
    }


def random_batch(config: ml_collections.ConfigDict, classes: int) -> dict[str, np.ndarray]:
    """A training batch of the configuration's sizes with random pixels, see `make_train_step`."""
    rng, size, batch = np.random.default_rng(0), config.data.crop_size, config.train.batch_size
    image = rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
    label = rng.integers(0, classes, image.shape[:3]).astype(np.uint8)
    return {"image": image, "label": label, "valid": np.full((batch, 2), size, np.int32)}


def time_train_step(config, model, mesh, variables, data, steps: int) -> tuple[float, int]:
    """Median seconds of `steps` training steps, and the bytes per device of one as compiled.

    With train.steps set it is the program that training runs: a compilation cache keeps it.
    """
    optimizer = optimizers.create(config.optimizer, config.train.steps or steps + WARM_UP)
    state = jax.device_put(
        create_state(model, optimizer, config, variables), sharding.replicated(mesh)
    )
    data = jax.device_put(data, sharding.batched(mesh))
    jitted = sharding.jit_train_step(make_train_step(model, optimizer, config), mesh)
    compiled = jitted.lower(state, data).compile()

    def call():
        nonlocal state
        state, metrics = compiled(state, data)
        return state, metrics

    m: Any = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return median_seconds(call, steps), peak - m.alias_size_in_bytes


def main(_) -> None:
    args = flags.FLAGS
    segmenter.enable_dtype(args.config.model)
    result = benchmark(args.config, args.steps)
    print("{devices} x {device}, {dtype}, images {image}".format(**result))
    for kind in ("train", "inference"):
        r = result[kind]
        speed = f"{r['images_per_second']:.1f} images/s, {r['flop_per_second'] / 1e12:.3f} TFLOP/s"
        print(f"{kind}, batch {r['batch_size']}: {1000 * r['seconds']:.1f} ms, {speed}")
    peak = result["train"]["peak_bytes_per_device"]
    print(f"memory of the training step: {peak / 2**20:,.0f} MiB per device")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
    flags.DEFINE_integer("steps", 5, "Timed calls; the median counts.", lower_bound=1)
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
