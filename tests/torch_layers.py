"""PyTorch's side of `duc_dlc_jax.benchmark --what=layers --peer=torch`: convolutions one by one.

    python tests/torch_layers.py SETTINGS        (started by the benchmark)

SETTINGS is JSON: shapes, batch, dtype and steps, see `duc_dlc_jax/benchmark/layers.py`. For each
shape a line of JSON: seconds of a dilated 3x3 convolution and of both its gradients, channels_last,
and the clock. On a GPU that is a CUDA graph of many calls, whose launches cost no time on the host,
or, where PyTorch cannot record them, CUDA events around the calls.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def row(shape, batch: int, dtype: torch.dtype, steps: int) -> dict:
    """{clock, seconds of each function}; the last clock, should they differ."""
    channels, features, side, dilation = shape
    made = {"device": DEVICE, "dtype": dtype}
    x = torch.randn(batch, channels, side, side, **made)
    kernel = torch.randn(features, channels, 3, 3, **made)
    dy = torch.randn(batch, features, side, side, **made)
    x, kernel, dy = (a.contiguous(memory_format=torch.channels_last) for a in (x, kernel, dy))
    pad = [dilation] * 2

    def gradient(mask):
        return torch.ops.aten.convolution_backward(
            dy, x, kernel, None, [1, 1], pad, pad, False, [0, 0], 1, mask
        )

    functions = {
        "forward": lambda: F.conv2d(x, kernel, None, 1, pad, pad),
        "input gradient": lambda: gradient([True, False, False]),
        "weight gradient": lambda: gradient([False, True, False]),
    }
    found: dict = {"clock": ""}
    for name, function in functions.items():
        found[name], found["clock"] = seconds(function, steps)
    return found


def seconds(function: Callable, steps: int) -> tuple[float, str]:
    """Of one call, the median of `steps` rounds; and by which clock."""
    if DEVICE.type == "cpu":
        return on_cpu(function, steps, 5), "time of 5 calls"
    calls = 50
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN's search is no part of a graph
            function()
    torch.cuda.current_stream().wait_stream(side)

    def several() -> None:
        for _ in range(calls):
            function()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        run, clock = graph.replay, f"a CUDA graph of {calls} calls"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        torch.cuda.synchronize()
        run, clock = several, f"CUDA events around {calls} calls"
    return by_events(run, steps) / calls, clock


def by_events(run: Callable, steps: int) -> float:
    taken = []
    for _ in range(steps + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return float(np.median(taken[2:]))


def on_cpu(function: Callable, steps: int, calls: int) -> float:
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        taken.append((time.perf_counter() - start) / calls)
    return float(np.median(taken[1:]))


def main(settings: dict) -> None:
    torch.backends.cudnn.benchmark = True
    dtype = getattr(torch, settings["dtype"])
    for shape in settings["shapes"]:
        print(json.dumps(row(shape, settings["batch"], dtype, settings["steps"])), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
