"""Where the time of a compiled program goes: kernels by layer group, from a profiler trace."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from duc_dlc_jax import programs
from duc_dlc_jax.benchmark.floor import group_of

_NAME = re.compile(r'op_name="([^"]*)"')


def trace(call: Callable[[], Any], calls: int) -> dict[str, dict[str, float]]:
    """Runs `call` under the profiler: {HLO instruction: {seconds, count}} of one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        return _by_instruction(jax.profiler.ProfileData.from_file(str(file)), calls)


def _by_instruction(data: Any, calls: int) -> dict[str, dict[str, float]]:
    planes = [p for p in data.planes if "/device:" in p.name and "CUSTOM" not in p.name]
    planes = planes or [p for p in data.planes if p.name == "/host:CPU"]
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "count": 0.0})
    for plane in planes:
        for line in plane.lines:
            if line.name in ("XLA Modules", "XLA Ops", "Steps", "Framework Ops", "Source code"):
                continue  # summaries of the streams' kernels
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and "/device:" in plane.name:
                    name = f"kernel {event.name}"
                if name is None:
                    continue
                found[name]["seconds"] += event.duration_ns / 1e9 / calls
                found[name]["count"] += 1 / calls
    return dict(found)


def instructions(compiled_text: str) -> dict[str, str]:
    """{HLO instruction: name of the operation it came from}, of a compiled program's text.

    The compiler leaves some without: a fusion then takes the name of the last instruction in it
    that has one. What has none even so takes that of an operand, of the backward pass if one is (a
    kernel's gradient reads an activation and a gradient), or else of its first user.
    """
    _, found = programs.computations(compiled_text)
    names, last = {}, {}
    for computation, body in found.items():
        for instruction, it in body.items():
            if name := _NAME.search(it.rest):
                names[instruction] = last[computation] = name[1]
    every = {name: it for body in found.values() for name, it in body.items()}
    for instruction, it in every.items():  # in order: operands come first
        if instruction in names:
            continue
        known = [last[c] for kind, c in programs.called(it) if kind == "calls" and c in last]
        known = known or [names[o] for o in it.operands if o in names]
        if known:
            names[instruction] = max(known, key=lambda name: "transpose(" in name)
    for instruction, it in every.items():
        if instruction in names:
            for operand in it.operands:
                names.setdefault(operand, names[instruction])
    return names


def group(operation: str, modules: Collection[str]) -> tuple[str, str]:
    """(layer group, forward | backward) of an operation's name, as JAX writes it.

    modules: the network's parts, as its parameters name them.
    "jit(train_step)/transpose(jvp(Segmenter))/backbone/layer1_0/conv1/..." -> (layer1, backward).
    """
    direction = "backward" if "transpose(" in operation else "forward"
    parts = re.split(r"[/()]+", operation)
    for start in modules:
        if start in parts:
            rest = parts[parts.index(start) :]
            if start == "duc" and "duc._guidance" in operation:
                return "guidance", direction
            return group_of((rest[0], *(rest[1:2] or [""]))), direction
    for start in ("loss", "optimizer"):
        if start in parts:
            return start, direction
    return "other", direction


def by_group(
    times: dict[str, dict[str, float]], names: dict[str, str], modules: Collection[str]
) -> list[dict[str, Any]]:
    """Rows {group, direction, seconds, kernels}, slowest first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for instruction, figures in times.items():
        key = group(names.get(instruction, ""), modules)
        found[key][0] += figures["seconds"]
        found[key][1] += figures["count"]
    rows = [
        {"group": g, "direction": d, "seconds": s, "kernels": n} for (g, d), (s, n) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def slowest(times: dict[str, dict[str, float]], names: dict[str, str], count: int) -> list[dict]:
    """The `count` instructions that take longest, with the operations they came from."""
    order = sorted(times, key=lambda name: -times[name]["seconds"])[:count]
    return [{"instruction": n, "operation": names.get(n, ""), **times[n]} for n in order]
