"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of KINDS.
      bytes: of its result on one device; what all-reduces and permutes are given is as large.
      group: devices that take part together (of a permute: 2).
      elements: of its largest array.
      source: the operation of the model that it serves, as the program names it.
    """

    kind: str
    bytes: int
    group: int
    elements: int
    source: str


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program (`compiled.as_text()`), in its order; loops count once."""
    found = []
    for line in text.splitlines():
        call = _CALL.search(line)
        if not call:
            continue
        arrays = [_array(match) for match in _ARRAY.finditer(call["result"])]
        if call["start"] and call["kind"] == "collective-permute":  # operand, result, flags
            arrays = arrays[1:2]
        elif call["start"] and call["kind"] != "all-reduce":  # operands, results
            arrays = arrays[len(arrays) // 2 :]
        name = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                call["kind"],
                sum(size * elements for elements, size in arrays),
                2 if call["kind"] == "collective-permute" else _group(line),
                max(elements for elements, _ in arrays),
                name[1] if name else "",
            )
        )
    return found


def totals(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}}, kinds that occur."""
    result: dict[str, dict[str, int]] = {}
    for one in found:
        row = result.setdefault(one.kind, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += one.bytes
    return result


def _array(match: re.Match) -> tuple[int, int]:
    """(elements, bytes of one)."""
    bits = 8 if match["dtype"] == "pred" else int(re.findall(r"\d+", match["dtype"])[0])
    return math.prod(int(n) for n in match["shape"].split(",") if n), max(bits // 8, 1)


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
