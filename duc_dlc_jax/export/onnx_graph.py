"""A folded network as an ONNX graph of native NCHW operators: Conv, MaxPool, Resize, Concat.

The graph follows JAX's own trace of the network, so that there is one definition of it. Functions
with a name (`conv:PATH`, `max_pool`, `resize_GRID`, `relu`) become one node each, the few operators
between them one each as well, and an operator that is in no table here is refused by name.
Images and outputs keep the layout of the StableHLO model: [B, H, W, C].
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

import duc_dlc_jax
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.export.folding import CONV_PREFIX, FoldedNetwork

OPSET, IR_VERSION = 17, 8  # of ONNX 1.12: what TensorRT 8.6, OpenVINO 2023 and later read
# Pixels, for any size: odd, so that cuts at the image's end are traced, and such that no fixed grid
# is by chance that of a stride.
TRACED = (32 * 13 - 5, 32 * 17 - 9)
ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "exp": "Exp"}
ELEMENTWISE |= {"tanh": "Tanh", "logistic": "Sigmoid", "neg": "Neg", "sqrt": "Sqrt"}
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def build(network: FoldedNetwork, size: tuple[int, int] | None, dtype: Any, kind: str) -> bytes:
    """The serialised model `image` [B, H, W, 3] of `dtype` -> `ids` or `logits`.

    size: (height, width) in pixels, or None for any; the batch is always free.

    Raises ConfigError for an operator that has no ONNX equivalent here; names it and its module.
    """
    return _Graph(network, size, dtype, kind).serialised()


class _Graph:
    def __init__(self, network, size, dtype, kind):
        import onnx

        self._onnx = onnx
        self._network = network
        self._fixed = size is not None
        self._traced = size or TRACED
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self._targets: dict[Any, str] = {}  # (height, width) tensors by their stride or size
        self._module = ""
        dims = ["batch", *(size or ("height", "width"))]
        image = jax.ShapeDtypeStruct((2, *self._traced, 3), dtype)
        traced = jax.make_jaxpr(network.output(kind))(image)
        value = self._node("Transpose", "image", perm=TO_NCHW)
        (result,) = self._jaxpr(traced, [value])
        shape = [*dims, network.model.num_classes]
        if kind == "logits":
            self._node("Transpose", result, perm=TO_NHWC, output="logits")
        else:
            self._node("Identity", result, output="ids")
        (out,) = traced.out_avals
        self._input = self._info("image", dtype, [*dims, 3])
        self._output = self._info(kind, out.dtype, shape[: len(out.shape)])

    def serialised(self) -> bytes:
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, "duc_dlc_jax", [self._input], [self._output], self._initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="duc_dlc_jax",
            producer_version=duc_dlc_jax.__version__,
        )
        self._onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    # Nodes

    def _info(self, name, dtype, shape):
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, kind, shape)

    def _node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self._module}/{op}_{len(self._nodes)}"
        output = output or name
        made = self._onnx.helper.make_node(op, inputs, [output], name=name, **attributes)
        self._nodes.append(made)
        return output

    def _constant(self, values: Any, dtype: Any = None) -> str:
        array = np.asarray(values, dtype)
        name = f"constant_{len(self._initializers)}"
        self._initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _refuse(self, what: str, way_out: str = "") -> ConfigError:
        where = self._module or "the network"
        return ConfigError(
            f"ONNX: {what} in {where} has no equivalent in duc_dlc_jax/export/onnx_graph.py. "
            f"Export with --format=stablehlo, which takes every network{way_out}"
        )

    # Walking

    def _jaxpr(self, closed: Any, inputs: list[Any]) -> list[Any]:
        """Nodes for an inner program; values are names of tensors or NumPy arrays, constants."""
        values: dict[Any, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        values |= dict(zip(closed.jaxpr.constvars, map(np.asarray, closed.consts), strict=True))

        def read(atom):
            if isinstance(atom, Literal):
                return np.asarray(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
            return values[atom]

        for equation in closed.jaxpr.eqns:
            self._module = str(equation.source_info.name_stack) or self._module
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name, inner = equation.params.get("name", ""), _inner(equation)
        if inner is not None and name.startswith(CONV_PREFIX):
            return [self._convolution(name.removeprefix(CONV_PREFIX), inputs[0])]
        if inner is not None and name in ("max_pool", "image_mean", "pixel_shuffle"):
            x, y = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            operators: dict[str, tuple[str, dict[str, Any]]] = {
                "max_pool": (
                    "MaxPool",
                    dict(kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
                ),
                "image_mean": ("GlobalAveragePool", {}),
                "pixel_shuffle": ("DepthToSpace", dict(blocksize=y[1] // x[1])),
            }
            operator, attributes = operators[name]
            return [self._node(operator, inputs[0], **attributes)]
        if inner is not None and name.startswith("resize_"):
            (x,), (y,) = equation.invars, equation.outvars
            grid = name.removeprefix("resize_")
            return [self._resize(inputs[0], x.aval.shape, y.aval.shape, grid)]
        if inner is not None:
            return self._jaxpr(inner, inputs)
        if all(isinstance(value, np.ndarray) for value in inputs):
            results = equation.primitive.bind(*inputs, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
            return [np.asarray(x) for x in results]
        return self._operator(equation, inputs)

    def _operator(self, equation: Any, inputs: list[Any]) -> list[Any]:
        op, params = equation.primitive.name, equation.params
        ranks = [len(x.aval.shape) for x in (*equation.invars, *equation.outvars)]
        if op == "max" and isinstance(inputs[1], np.ndarray) and not inputs[1].any():
            return [self._node("Relu", inputs[0])]
        if op in ELEMENTWISE and set(ranks) <= {0, 4}:
            return [self._node(ELEMENTWISE[op], *map(self._nchw, inputs))]
        if op == "convert_element_type":
            kind = self._onnx.helper.np_dtype_to_tensor_dtype(params["new_dtype"])
            return [self._node("Cast", inputs[0], to=kind)]
        if op == "concatenate" and ranks[-1] == 4:
            axis = TO_NCHW.index(params["dimension"])
            return [self._node("Concat", *map(self._nchw, inputs), axis=axis)]
        if op == "split" and ranks[0] == 4:
            axis, ends = TO_NCHW.index(params["axis"]), np.cumsum((0, *params["sizes"]))
            return [
                self._node("Slice", inputs[0], *map(self._constant, ([low], [high], [axis])))
                for low, high in itertools.pairwise(ends)
            ]
        if op == "slice" and ranks[0] == 4 and self._cuts_the_end(equation):
            end = self._size(equation.outvars[0].aval.shape[1:3])
            return [self._node("Slice", inputs[0], self._constant([0, 0]), end, self._axes())]
        if op == "broadcast_in_dim" and params["broadcast_dimensions"] == (0, 1, 2, 3):
            return [self._node("Expand", inputs[0], self._shape(inputs[0], params["shape"]))]
        if op == "argmax" and ranks[0] == 4 and params["axes"] == (3,):
            return [self._node("ArgMax", inputs[0], axis=1, keepdims=0)]
        raise self._refuse(f"the operator {op!r}")

    def _nchw(self, value: Any) -> str:
        if not isinstance(value, np.ndarray):
            return value
        if value.ndim not in (0, 4):
            raise self._refuse(f"a constant of shape {value.shape}")
        return self._constant(value.transpose(TO_NCHW) if value.ndim == 4 else value)

    def _convolution(self, path: str, x: str) -> str:
        c, dtype = self._network.convolutions[path], self._network.dtype
        kernel = self._constant(c.kernel.transpose(3, 2, 0, 1), dtype)
        return self._node(
            "Conv",
            x,
            kernel,
            self._constant(c.bias, dtype),
            kernel_shape=c.kernel.shape[:2],
            strides=(c.stride, c.stride),
            pads=(c.padding,) * 4,
            dilations=(c.dilation, c.dilation),
            group=c.groups,
        )

    # Resizing

    def _resize(self, x: str, shape: tuple, target: tuple, grid: str) -> str:
        """x, [B, C, h, w] here: shape and target are its NHWC sizes, as traced."""
        modes = {"corners": "align_corners", "half_pixel": "half_pixel"}
        if grid in modes:
            sizes = self._shape(x, target)
            transform = dict(coordinate_transformation_mode=modes[grid])
            return self._node("Resize", x, "", "", sizes, mode="linear", **transform)
        if grid != "stride":
            raise self._refuse(f"the resize grid {grid!r}")
        # Output cell i lies at input cell i * step, whatever the sizes: whole scales, then a cut.
        strides = [_stride(grid[1:3], self._traced) for grid in (target, shape)]
        if None in strides:
            raise self._refuse(f"a resize of {shape[1:3]} to {target[1:3]}")
        step = strides[0] / strides[1]  # type: ignore[operator]
        if step > 1:
            ends = self._constant([2**62, 2**62])
            steps = self._constant([int(step)] * 2)
            return self._node("Slice", x, self._constant([0, 0]), ends, self._axes(), steps)
        scales = self._constant([1, 1, 1 / step, 1 / step], np.float32)
        transform = dict(coordinate_transformation_mode="asymmetric")
        x = self._node("Resize", x, "", scales, mode="linear", **transform)
        ends = self._size(target[1:3])
        return self._node("Slice", x, self._constant([0, 0]), ends, self._axes())

    def _cuts_the_end(self, equation: Any) -> bool:
        """Whether a slice keeps the first rows and columns, all of the batch and the channels."""
        shape, params = equation.invars[0].aval.shape, equation.params
        kept = [params["limit_indices"][axis] == shape[axis] for axis in (0, 3)]
        return not any(params["start_indices"]) and params["strides"] is None and all(kept)

    def _shape(self, x: str, target: tuple) -> str:
        """The shape of x, [B, C, h, w] here, with the sides of the NHWC shape target."""
        lead = self._node("Slice", self._node("Shape", x), *self._range(0, 2))
        return self._node("Concat", lead, self._size(target[1:3]), axis=0)

    def _axes(self) -> str:
        return self._constant([2, 3])

    def _range(self, first: int, last: int) -> tuple[str, str]:
        return self._constant([first]), self._constant([last])

    def _size(self, grid: tuple[int, int]) -> str:
        """An int64 tensor (height, width) of a grid: ceil(image / stride), or fixed."""
        if self._fixed:
            if grid not in self._targets:
                self._targets[grid] = self._constant(grid)
            return self._targets[grid]
        stride = _stride(grid, self._traced)
        if stride is None:
            raise self._refuse(f"a grid of {grid} for any image", ", or for one --size=HxW")
        if stride not in self._targets:
            image = self._node("Slice", self._node("Shape", "image"), *self._range(1, 3))
            more = self._node("Add", image, self._constant([stride - 1]))
            self._targets[stride] = self._node("Div", more, self._constant([stride]))
        return self._targets[stride]


def _stride(grid: tuple[int, int], image: tuple[int, int]) -> int | None:
    """The power of 2 by which both sides of a grid divide those of the image, rounded up."""
    stride = 2 ** math.ceil(math.log2(image[0] / grid[0]))
    return stride if all(-(-n // stride) == m for n, m in zip(image, grid, strict=True)) else None


def _inner(equation: Any) -> Any:
    """The program of a call (jit, custom derivative), or None."""
    for name in ("jaxpr", "call_jaxpr"):
        if name in equation.params:
            return equation.params[name]
    return None
