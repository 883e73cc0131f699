"""The network in numbers, from shapes alone: parameters, multiply-adds, grids, receptive field."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models import registry, segmenter
from duc_dlc_jax.models.duc import DUC
from duc_dlc_jax.models.layers import Conv
from duc_dlc_jax.models.segmenter import Segmenter


def parameters(model: Segmenter) -> dict[str, int]:
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


def convolutions(model: Segmenter, height: int, width: int) -> list[Convolution]:
    """The convolutions of an image of height x width in order, as the paper has them.

    (Those of g(I) are on the whole image; what `DUC` computes instead is in `benchmark.floor`.)
    """
    return list(_convolutions(model, height, width))


def _noted(model: Segmenter, height: int, width: int) -> tuple[Convolution, ...]:
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
_shapes: Any = functools.lru_cache(maxsize=16)(segmenter.variable_shapes)
_convolutions: Any = functools.lru_cache(maxsize=16)(_noted)


def macs(model: Segmenter, height: int, width: int) -> dict[str, int]:
    """Multiply-adds of the convolutions per part for one image of height x width, in inference.

    Resizes are not counted (x2 for FLOPs).
    """
    counts: dict[str, int] = defaultdict(int)
    for convolution in convolutions(model, height, width):
        counts[convolution.path[0]] += convolution.macs
    return dict(counts)


def activation_bytes(model: Segmenter, height: int, width: int) -> int:
    """Estimates the bytes that one training image of height x width needs beside the train state.

    3 times the outputs of all convolutions and 5 times the logits at full size: 1.3 to 1.6 times
    what XLA's compiled steps needed on a CPU (14 and 50 layers, 8 to 60 classes, 128 to 256
    pixels).
    """
    outputs = sum(c.outputs for c in convolutions(model, height, width))
    logits = model.num_classes * height * width
    return 3 * outputs * jnp.dtype(model.dtype).itemsize + 5 * 4 * logits


def receptive_field(rates: Iterable[int]) -> list[int]:
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
