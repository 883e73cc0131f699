"""`python -m duc_dlc_jax.describe --config=configs/X.py [--json]`: the network in numbers.

Everything is computed from shapes; nothing is compiled and no data set is needed. With
`--devices=64` or `--topology=v5e:4x4` the training step is compiled for these devices, which need
not be there: `forecast`. `--hours` says how long the training takes by steps that were timed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import defaultdict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, forecast, hours
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import registry, segmenter
from duc_dlc_jax.models.duc import DUC
from duc_dlc_jax.models.layers import Conv
from duc_dlc_jax.train_step import create_state


def _traced(model: segmenter.Segmenter) -> Any:
    """The shapes of its variables."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8))


def parameters(model: segmenter.Segmenter) -> dict[str, int]:
    """Number of parameters per part: backbone, upsampling, context, classifier (and aux_*)."""
    return {
        part: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
        for part, tree in _shapes(model)["params"].items()
    }


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of one image: where it is, and how many numbers it reads, has and writes."""

    path: tuple[str, ...]
    inputs: int
    weights: int
    outputs: int
    macs: int


def convolutions(model: segmenter.Segmenter, height: int, width: int) -> list[Convolution]:
    """The convolutions of an image of height x width in order, as the paper has them.

    (Those of g(I) are on the whole image; what `DUC` computes instead is in `benchmark.floor`.)
    """
    return list(_convolutions(model, height, width))


def _noted(model: segmenter.Segmenter, height: int, width: int) -> tuple[Convolution, ...]:
    found = []

    def note(call, args, kwargs, context):
        output, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__":
            if isinstance(module, Conv):
                inputs, outputs = math.prod(args[0].shape), math.prod(output.shape)
                fan_in = module.kernel**2 * args[0].shape[-1] // module.groups
                weights = fan_in * module.features
                found.append(Convolution(module.path, inputs, weights, outputs, outputs * fan_in))
            if isinstance(module, DUC):
                for name, (inputs, outputs, fan_in, weights) in module.guidance_convolutions(
                    *args[0].shape[1:3]
                ).items():
                    path = (*module.path, name)
                    found.append(Convolution(path, inputs, weights, outputs, outputs * fan_in))
        return output

    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    variables = _shapes(model)  # before: nothing of it is to be noted
    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, variables, image)
    return tuple(found)


# Tracing a deep network takes a second. Any: pyright takes Flax's modules for unhashable.
_shapes: Any = functools.lru_cache(maxsize=16)(_traced)
_convolutions: Any = functools.lru_cache(maxsize=16)(_noted)


def macs(model: segmenter.Segmenter, height: int, width: int) -> dict[str, int]:
    """Multiply-adds of the convolutions per part for one image of height x width, in inference.

    Resizes are not counted (x2 for FLOPs).
    """
    counts: dict[str, int] = defaultdict(int)
    for convolution in convolutions(model, height, width):
        counts[convolution.path[0]] += convolution.macs
    return dict(counts)


def activation_bytes(model: segmenter.Segmenter, height: int, width: int) -> int:
    """Estimates the bytes that one training image of height x width needs beside the train state.

    3 times the outputs of all convolutions and 5 times the logits at full size: 1.3 to 1.6 times
    what XLA's compiled steps needed on a CPU (14 and 50 layers, 8 to 60 classes, 128 to 256
    pixels).
    """
    outputs = sum(c.outputs for c in convolutions(model, height, width))
    logits = model.num_classes * height * width
    return 3 * outputs * jnp.dtype(model.dtype).itemsize + 5 * 4 * logits


def receptive_field(rates) -> list[int]:
    """Receptive field after each rate of the DLC cascade, in cells (eq. 4 and 5, 3x3 kernels)."""
    field, fields = 1, []
    for rate in rates:
        field += (rate - 1) * 2 + 3 - 1
        fields.append(field)
    return fields


def grids(
    height: int, width: int, output_stride: int, upsampling: str = "duc"
) -> dict[str, tuple[int, int]]:
    """Cells of each grid for an image of height x width: ceil(size / stride)."""
    strides = {"image": 1, "layer1 (1/4)": 4, "layer2 (1/8)": 8}
    strides[f"layer4 (1/{output_stride})"] = output_stride
    stride = registry.context_stride(upsampling, output_stride)
    strides[f"context (1/{stride})"] = stride
    return {name: (-(-height // s), -(-width // s)) for name, s in strides.items()}


def state_bytes(config: ml_collections.ConfigDict, model: segmenter.Segmenter) -> int:
    """Bytes of the train state: parameters, momentum, statistics and, if kept, their average."""
    optimizer = optimizers.create(config.optimizer, 1)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)

    def state():
        return create_state(model, optimizer, config, dict(model.init(jax.random.key(0), image)))

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(state)))


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All figures of this module for `config`, at its crop size and its data set's classes."""
    config_lib.validate(config)
    spec, size = find_spec(config.data), config_lib.crop_shape(config.data)
    model = segmenter.create(config.model, spec.num_classes)
    figures = {
        "data set": spec.name,
        "classes": spec.num_classes,
        "parameters": parameters(model),
        "image": list(size),
        "macs": macs(model, *size),
        "grids": grids(*size, config.model.output_stride, config.model.upsampling),
        "train_state_bytes": state_bytes(config, model),
    }
    if config.model.context == "dlc":
        figures["receptive_field_dlc"] = receptive_field(config.model.dlc_rates)
    return figures


def text(d: dict[str, Any]) -> str:
    """The figures as aligned lines."""
    size = "x".join(map(str, d["image"]))
    rows = [f"{d['data set']}, {d['classes']} classes; multiply-adds for one {size} image"]
    rows.append(f"{'part':<16}{'parameters':>14}{'GMACs':>10}")
    for part, count in d["parameters"].items():
        rows.append(f"{part:<16}{count:>14,}{d['macs'].get(part, 0) / 1e9:>10.2f}")
    total = sum(d["macs"].values()) / 1e9
    rows.append(f"{'total':<16}{sum(d['parameters'].values()):>14,}{total:>10.2f}")
    rows += [f"grid of {name}: {h} x {w}" for name, (h, w) in d["grids"].items()]
    if "receptive_field_dlc" in d:
        fields, grid = " -> ".join(map(str, d["receptive_field_dlc"])), list(d["grids"])[-1]
        rows.append(f"receptive field of DLC's cascade: {fields} cells of the grid of {grid}")
    rows.append(f"train state: {d['train_state_bytes'] / 2**20:.0f} MiB")
    return "\n".join(rows)


def main(_) -> None:
    args = flags.FLAGS
    config_lib.validate(args.config)
    if args.devices:
        what = f"{args.devices} devices"
        make = functools.partial(forecast.on_cpu_devices, args.config, args.devices)
    elif args.topology:
        what = args.topology + " with full effort" * args.full_effort
        make = functools.partial(forecast.on_topology, args.config, args.topology, args.full_effort)
    else:
        figures = hours.predict(args.config) if args.hours else describe(args.config)
        shown = hours.text if args.hours else text
        print(json.dumps(figures, indent=1) if args.json else shown(figures))
        return
    figures = forecast.cached(args.config, what, make)
    print(json.dumps(figures, indent=1) if args.json else forecast.text(figures))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_integer("devices", 0, "FLOPs and collectives on so many devices.")
    flags.DEFINE_string("topology", "", "Memory, time and efficiency on a TPU slice: v5e:4x4.")
    flags.DEFINE_bool("hours", False, "Hours of the training on devices whose step was timed.")
    flags.DEFINE_bool("full_effort", False, "Compile for --topology as for running: slow.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
