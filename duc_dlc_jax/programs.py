"""What a compiled program computes and moves, with its loops as often as they run.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs: the loss's slabs of
rows and the parts of a batch are such loops.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

# Compiler options for programs that are looked at and not run, which need no good machine code.
QUICK_CPU = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
QUICK_TPU = {"exec_time_optimization_effort": -1.0}

Computations = dict[str, dict[str, "Instruction"]]

_HEAD = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Whose results are there already, or which only name what others move.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call")
_FREE += ("conditional", "iota", "after-all", "copy-done", "opt-barrier", "all-reduce-done")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: name = result opcode(operands), attributes."""

    opcode: str
    arrays: tuple[tuple[int, tuple[int, ...]], ...]  # of the result: bytes of a number, shape
    operands: tuple[str, ...]
    rest: str  # from the operands on

    @property
    def bytes(self) -> int:
        return sum(size * math.prod(shape) for size, shape in self.arrays)


def arrays(text: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(bytes of a number, shape) of each array in a type as XLA writes it."""
    found = []
    for match in _ARRAY.finditer(text):
        bits = 8 if match["dtype"] == "pred" else int(re.findall(r"\d+", match["dtype"])[0])
        shape = tuple(int(n) for n in match["shape"].split(",") if n)
        found.append((max(bits // 8, 1), shape))
    return tuple(found)


def head(line: str) -> str:
    """The name of the computation that begins with this line, or ""."""
    match = _HEAD.match(line)
    return match["name"] if match else ""


def computations(text: str) -> tuple[str, Computations]:
    """(name of the entry, {computation: {name: instruction}}) of `compiled.as_text()`."""
    found: Computations = {}
    entry, current = "", {}
    for line in text.splitlines():
        if name := head(line):
            current = found.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif match := _LINE.match(line):
            name, result, opcode, rest = match.groups()
            inside = rest.split("), ")[0]
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            current[name] = Instruction(opcode, arrays(result), operands, rest)
    return entry, found


def runs(entry: str, found: Computations) -> dict[str, int]:
    """How often each computation runs when the program runs once."""
    times: dict[str, int] = defaultdict(int)

    def run(name: str, count: int) -> None:
        times[name] += count
        for instruction in found.get(name, {}).values():
            for kind, other in called(instruction):
                loop = kind in ("body", "condition")
                run(other, count * (_trips(instruction, found) if loop else 1))

    run(entry, 1)
    return dict(times)


def called(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """(how, computation) of those that an instruction runs."""
    yield from _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from (("branch", name.strip(" %")) for name in names.split(","))


def _trips(loop: Instruction, found: Computations) -> int:
    """As the compiler notes it, or by the one number that the condition compares with; else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = dict(called(loop)).get("condition", "")
    bounds = [
        int(number[1])
        for instruction in found.get(condition, {}).values()
        if instruction.opcode == "constant" and (number := re.match(r"(\d+)\)", instruction.rest))
    ]
    return bounds[0] if len(bounds) == 1 else 1


def cost(compiled: Any) -> tuple[float, float]:
    """FLOPs, and bytes that its kernels read and write, of a compiled program on one device.

    XLA's count, and for what loops do after their first turn ours: of FLOPs those of matrix
    products and convolutions, of bytes each operand and each result once.
    """
    counted: Any = compiled.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted
    again = repeated(compiled.as_text())
    return counted["flops"] + again[0], counted.get("bytes accessed", 0.0) + again[1]


def repeated(text: str) -> tuple[int, int]:
    """FLOPs and bytes of all turns of the loops but the first."""
    entry, found = computations(text)
    kernels = {c for body in found.values() for i in body.values() for c in _kernel(i)}
    flops = moved = 0
    for name, times in runs(entry, found).items():
        body = found.get(name, {})
        if times > 1:
            flops += (times - 1) * sum(_flops(i, body) for i in body.values())
        if times > 1 and name not in kernels:
            moved += (times - 1) * sum(_moved(i, body, found) for i in body.values())
    return flops, moved


def _flops(instruction: Instruction, body: dict[str, Instruction]) -> int:
    """2 per multiply-add; zeros between the inputs of a convolution are not counted."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    result = math.prod(instruction.arrays[0][1])
    left, right = (body[name].arrays[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2 * result * math.prod(left[int(i)] for i in axes[1].split(",") if i) if axes else 0
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
    window = re.search(r"lhs_dilate=([\dx]+)", instruction.rest)
    zeros = math.prod(int(n) for n in window[1].split("x")) if window else 1
    features = right[labels[1].index("o")] if labels else 1
    return 2 * result * (math.prod(right) // features) // zeros


def _kernel(instruction: Instruction) -> Iterable[str]:
    """Computations that are part of this instruction and no kernels of their own."""
    if instruction.opcode in ("while", "call", "conditional"):
        return ()
    return (name for _, name in called(instruction))


def _moved(instruction: Instruction, body: dict[str, Instruction], found: Computations) -> int:
    """Of an operand that a fusion takes slices of, or writes a slice into, the slices."""
    if instruction.opcode in _FREE:
        return 0
    if instruction.opcode in ("dynamic-slice", "slice"):
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * body[instruction.operands[1]].bytes
    inner = next((found[name] for name in _kernel(instruction) if name in found), {})
    if instruction.opcode != "fusion":
        inner = {}
    parameters = {
        int(i.rest.split(")")[0]): name for name, i in inner.items() if i.opcode == "parameter"
    }
    total, written = 0, instruction.bytes
    for position, operand in enumerate(instruction.operands):
        whole = body[operand].bytes if operand in body else 0
        name = parameters.get(position)
        readers = [i for i in inner.values() if name in i.operands]
        slices = [i for i in readers if i.opcode in ("dynamic-slice", "slice")]
        updates = [
            i for i in readers if i.opcode == "dynamic-update-slice" and i.operands[0] == name
        ]
        if readers and len(slices) + len(updates) == len(readers):
            if updates:  # in place
                written += sum(inner[i.operands[1]].bytes for i in updates) - whole
            whole = min(whole, sum(i.bytes for i in slices))
        total += whole
    return total + max(written, 0)
