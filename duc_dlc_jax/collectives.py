"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from duc_dlc_jax import programs

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of KINDS.
      bytes: of its result on one device; what all-reduces and permutes are given is as large.
      group: devices that take part together (of a permute: 2).
      elements: of its largest array.
      times: how often it runs: more than once in a loop.
      source: the operation of the model that it serves, as the program names it.
    """

    kind: str
    bytes: int
    group: int
    elements: int
    source: str
    times: int = 1


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program (`compiled.as_text()`), in its order."""
    found, times = [], 1
    runs = programs.runs(*programs.computations(text))
    for line in text.splitlines():
        if name := programs.head(line):
            times = runs.get(name, 1)
        call = _CALL.search(line)
        if not call:
            continue
        arrays = programs.arrays(call["result"])
        if call["start"] and call["kind"] == "collective-permute":  # operand, result, flags
            arrays = arrays[1:2]
        elif call["start"] and call["kind"] != "all-reduce":  # operands, results
            arrays = arrays[len(arrays) // 2 :]
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                call["kind"],
                sum(size * math.prod(shape) for size, shape in arrays),
                2 if call["kind"] == "collective-permute" else _group(line),
                max(math.prod(shape) for _, shape in arrays),
                source[1] if source else "",
                times,
            )
        )
    return found


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}}, kinds that occur; those in loops as often as they run."""
    result: dict[str, dict[str, int]] = {}
    for one in found:
        row = result.setdefault(one.kind, {"count": 0, "bytes": 0})
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
    return result


def _group(line: str) -> int:
    """Devices in a group, from any of the ways in which XLA writes groups."""
    groups = line[line.index("replica_groups=") + len("replica_groups=") :]
    if groups.startswith("mesh["):  # mesh['a'=2,'b'=4], device_ids=(...) {'b'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[: groups.index("]")]))
        if axes := re.search(r"\][^{]*\{([^}]*)\}", groups):  # 'b':(before)part takes part of b
            named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[1])
            return math.prod(int(part or sizes[name]) for name, part in named)
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):  # [groups,size]<=[...]
        return int(iota[1])
    if listed := re.match(r"\{\{([\d,]*)\}", groups):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    raise ValueError(f"replica groups of an unknown form: {line.strip()[:300]}")
