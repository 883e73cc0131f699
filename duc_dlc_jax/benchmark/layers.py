"""Dilated convolutions one by one: output, input gradient and weight gradient, beside PyTorch.

The weight gradient comes in the ways that `models.layers` has: the compiler's, and matrix products
of shifted inputs. One call of theirs is shorter than its dispatch: many are timed in one program,
each waiting for the one before, and PyTorch's in one CUDA graph (`tests/torch_layers.py`).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax import losses, pixel_scores
from duc_dlc_jax.benchmark import peer
from duc_dlc_jax.benchmark.timing import seconds_per_call
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import layers, resizing

# (channels in, channels out, side of the grid, dilation): DLC's branches at 1/8 of 480 pixels, the
# convolution of I_l, the dilated stages of output stride 16 and 8, layer1..4 at output stride 32.
SHAPES = [
    *((128, 128, 60, d) for d in (3, 6, 12, 18)),
    (2048, 512, 15, 2),
    (512, 512, 30, 2),
    (512, 512, 60, 4),
    (64, 64, 120, 1),
    (256, 256, 30, 1),
    (512, 512, 15, 1),
]


def arrays(shape: tuple[int, ...], batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input [B, s, s, C], kernel [3, 3, C, D] and the output's gradient [B, s, s, D], float32."""
    channels, features, side, _ = shape
    rng = np.random.default_rng(0)
    sizes = ((batch, side, side, channels), (3, 3, channels, features))
    sizes += ((batch, side, side, features),)
    x, kernel, dy = (rng.standard_normal(size, np.float32) for size in sizes)
    return x, kernel / np.sqrt(9 * channels).astype(np.float32), dy


def functions(dilation: int) -> dict[str, Callable[..., jax.Array]]:
    """(x, kernel, dy) -> one result each; the input's and the weights' gradients use only two."""

    def convolve(x, kernel):
        return layers.convolve(x, kernel, 1, dilation, 1, "compiler")

    def weights(way):
        def gradient(x, kernel, dy):
            _, back = jax.vjp(lambda w: layers.convolve(x, w, 1, dilation, 1, way), kernel)
            return back(dy)[0]

        return gradient

    return {
        "forward": lambda x, kernel, dy: convolve(x, kernel),
        "input gradient": lambda x, kernel, dy: jax.vjp(lambda v: convolve(v, kernel), x)[1](dy)[0],
        **{f"weight gradient, {way}": weights(way) for way in layers.WEIGHT_GRADIENTS},
    }


def repeated(function: Callable[..., jax.Array], calls: int, fed: int) -> Callable[..., jax.Array]:
    """Like `function` of arrays of rank 4, after `calls` calls in one program, one after the other.

    One number of the operand `fed` is written again between two calls, to what it was unless the
    result before begins with infinity. The compiler cannot know: it neither moves a call out of the
    loop, nor leaves one out, nor runs two at once.
    """

    def several(*operands: jax.Array) -> jax.Array:
        first = operands[fed][0, 0, 0, 0]

        def call(_, carried):
            operands, result = jax.lax.optimization_barrier(carried)
            number = jnp.where(jnp.isposinf(result[0, 0, 0, 0]), 0, first)
            operands = list(operands)
            operands[fed] = operands[fed].at[0, 0, 0, 0].set(number)
            return tuple(operands), function(*operands)

        shape = jax.eval_shape(function, *operands)
        start = operands, jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.fori_loop(0, calls, call, start)[1]

    return several


def name(shape: tuple[int, ...]) -> str:
    """128 -> 128, 60x60, 3: channels, grid and dilation of an entry of `SHAPES`."""
    channels, features, side, dilation = shape
    return f"{channels} -> {features}, {side}x{side}, {dilation}"


def row(shape: tuple[int, ...], dtype: Any, batch: int, steps: int) -> dict[str, Any]:
    """{flop, calls, seconds of each function, error}; see `functions`.

    seconds: of one of `calls` calls in one program, the median of `steps` runs; "loop alone" is
    that of a program without a function. On CPUs, which run a loop's convolutions in other ways
    than a program's, and whose calls are longer than their dispatch, a call is a program: calls is
    1. error: largest relative difference (Frobenius) of the ways to compute the weight gradient.
    """
    operands = tuple(jnp.asarray(a, dtype) for a in arrays(shape, batch))
    calls, asked = 1, functions(shape[3])
    if jax.default_backend() != "cpu":
        calls, asked = 50, asked | {"loop alone": lambda x, kernel, dy: x[:1, :1, :1, :1]}
    found: dict[str, Any] = {"flop": 2 * 9 * operands[0].size * shape[1], "calls": calls}
    gradients = []
    for what, function in asked.items():
        fed = 2 if what == "input gradient" else 0
        function = repeated(function, calls, fed) if calls > 1 else function
        program = functools.partial(jax.jit(function).lower(*operands).compile(), *operands)
        found[what] = seconds_per_call(program, steps, 1 if calls > 1 else 5) / calls
        if what.startswith("weight"):
            gradients.append(np.asarray(program(), np.float64))
    norm = np.linalg.norm(gradients[0])
    found["error"] = max(float(np.linalg.norm(g - gradients[0]) / norm) for g in gradients)
    return found


def torch_rows(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, batch: int, steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {clock, seconds of forward, input gradient and weight gradient}) of PyTorch.

    Raises ConfigError without a checkout, and where PyTorch's process ends early.
    """
    peer.check()
    settings = {"shapes": list(shapes.values()), "batch": batch, "steps": steps}
    settings["dtype"] = str(jnp.dtype(dtype))
    script = peer.SCRIPT.with_name("torch_layers.py")
    command = [sys.executable, str(script), json.dumps(settings)]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            waiting = iter(shapes)
            for line in process.stdout:
                if line.startswith("{"):
                    yield next(waiting), json.loads(line)
        if process.returncode:
            log.seek(0)
            raise ConfigError(f"PyTorch's process ended:\n{log.read()[-2000:]}")


def loss_functions(classes: int, batch: int, side: int) -> tuple[dict[str, Callable], tuple]:
    """{name: loss of (logits, labels)} of 1/8 logits in each way, and random logits and labels.

    "whole" has the logits at full size and JAX's own gradient; the others are `pixel_scores`, whose
    ways are those of CPUs, GPUs and TPUs.
    """
    rng, cells = np.random.default_rng(0), -(-side // 8)
    logits = jnp.asarray(rng.standard_normal((batch, cells, cells, classes), np.float32))
    labels = jnp.asarray(rng.integers(0, classes, (batch, side, side)).astype(np.uint8))

    def whole(logits, labels):
        x = resizing.resize_bilinear(logits, labels.shape[1:], "corners", 1 / 8)
        target = (labels[..., None] == jnp.arange(x.shape[-1])[None, None, None]) * x
        return (jax.nn.logsumexp(x, -1) - target.sum(-1)).mean()

    def slabs(way, rounded, logits, labels):
        scores: Any = pixel_scores.pixel_scores(logits, labels, stride=8, rounded=rounded, way=way)
        return losses.mean(*losses.sums(scores, labels))

    named = {"whole": whole} | {
        f"slabs, {way}, {dtype} gradient": functools.partial(slabs, way, jnp.dtype(dtype))
        for way in pixel_scores.WAYS
        for dtype in ("float32", "bfloat16")
    }
    return named, (logits, labels)


def loss_row(function: Callable, logits: jax.Array, labels: jax.Array, steps: int) -> dict:
    """{seconds, temporary_bytes} of a loss with its gradient by the logits."""
    program = jax.jit(jax.value_and_grad(function)).lower(logits, labels).compile()
    seconds = seconds_per_call(functools.partial(program, logits, labels), steps)
    memory: Any = program.memory_analysis()
    return {"seconds": seconds, "temporary_bytes": memory.temp_size_in_bytes}


def show_loss(name: str, row: dict[str, Any]) -> None:
    memory = f"{row['temporary_bytes'] / 2**20:,.0f} MiB"
    print(f"loss, {name}: {1e3 * row['seconds']:.2f} ms, {memory}", flush=True)


def show(name: str, row: dict[str, Any]) -> None:
    """Milliseconds of each function and, of ours, TFLOP/s, a line each."""
    print(f"{name}: " + (f"PyTorch, by {row['clock']}" if "clock" in row else "ours"), flush=True)
    for what, seconds in row.items():
        if what not in ("flop", "calls", "error", "clock", "of"):
            rate = f"{row['flop'] / seconds / 1e12:>8.1f} TFLOP/s" if "flop" in row else ""
            print(f"  {what:<28}{1e3 * seconds:>9.4f} ms{rate}", flush=True)
