"""Wall times of calls whose results are waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

WARM_UP = 2  # calls before the clock starts


def median_seconds(call: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> float:
    """Median wall time of `call`, whose result is waited for."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def seconds_per_call(call: Callable[[], Any], repeats: int, calls: int = 5) -> float:
    """Median over `repeats` rounds of the time of one of `calls` calls made without waiting.

    For calls so short that starting them one by one would be what is measured.
    """

    def several() -> Any:
        return [call() for _ in range(calls)]

    return median_seconds(several, repeats, 1) / calls
