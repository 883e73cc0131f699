"""`python -m duc_dlc_jax.benchmark.tables FILE.json ...`: what the benchmark measured, in Markdown.

A table for each part that a --json of the benchmark holds, as docs/performance.md has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from duc_dlc_jax import cli, markdown
from duc_dlc_jax.config import ConfigError

Values = dict[str, Any]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def rate(row: Values) -> str:
    share = f"{100 * row['floor_share']:.0f}% of the floor"
    return f"{ms(row['seconds'])}, {row['images_per_second']:.4g} images/s, {share}"


def steps(values: Values) -> Iterator[str]:
    """`train` and `infer` beside PyTorch's ways; then where their time goes."""
    rows = []
    for what in ("train", "infer"):
        if not (row := values.get(what)):
            continue
        size = "x".join(map(str, row["image"]))
        name = f"{what}, {row['batch_size']} of {size}"
        ours = f"{rate(row)}, {mib(row['peak_bytes_per_device'])}"
        ways = row.get("peer", {}).get("ways", {}) or {"": {}}
        for way, found in ways.items():
            theirs = f"{way} {ms(found['seconds'])}" if "seconds" in found else way
            if found.get("peak_bytes"):
                theirs += f", {mib(found['peak_bytes'])}"
            pairs = ", ".join(f"{ratio:.2f}" for ratio in found.get("ratios", ()))
            rows.append([name, ours, theirs, pairs or found.get("failed", "")])
            name = ours = ""
    if rows:
        yield markdown.table(["", "ours", "PyTorch", "its time over ours, pair by pair"], rows)
    for what in ("train", "infer"):
        if row := values.get(what, {}):
            yield from profile(what, row)


def profile(what: str, row: Values) -> Iterator[str]:
    taken = {(p["group"], p["direction"]): p["seconds"] for p in row.get("profile", ())}
    beside, least = row.get("peer_groups", {}), row["floor_by_group"]
    groups = dict.fromkeys(group for group, _ in taken)
    rows = [
        [group]
        + [f"{1e3 * of[key]:.2f}" if key in of else "" for of, key in (
            (taken, (group, "forward")), (taken, (group, "backward")), (least, group),
            (beside, group),
        )]
        for group in groups
    ]  # fmt: skip
    if rows:
        head = [f"{what}, ms", "forward", "backward", "floor of both", "PyTorch, labelling"]
        yield markdown.table(head, rows)


def networks(values: Values) -> Iterator[str]:
    """Training steps of `networks`; the time of `train`, where it is there, is 1."""
    plain = values.get("train", {}).get("seconds")
    named = {"train": values["train"]} if plain else {}
    rows = []
    for name, row in (named | values.get("networks", {})).items():
        if "failed" in row:
            rows.append([name, row["failed"], "", ""])
            continue
        beside = f"{row['seconds'] / plain:.3f}" if plain else ""
        rows.append([name, rate(row), beside, mib(row["peak_bytes_per_device"])])
    if "networks" in values:
        head = ["training step", "", "over `train`", "memory as compiled"]
        yield markdown.table(head, rows)


def convolutions(values: Values) -> Iterator[str]:
    """`layers`, each beside PyTorch's; then `losses`."""
    rows, torch = [], values.get("layers_torch", {})
    kinds = ("forward", "input gradient", "weight gradient")
    for name, row in values.get("layers", {}).items():
        ours = [key for key in row if key.startswith(kinds)]
        theirs = [f"{1e3 * torch[name][k]:.3f}" if name in torch else "" for k in kinds]
        rows.append([name, *(f"{1e3 * row[key]:.3f}" for key in ours), *theirs])
        head = ["ms", *ours, *(f"PyTorch, {kind}" for kind in kinds)]
    if rows:
        yield markdown.table(head, rows)
    losses = [
        [name, ms(row["seconds"]), mib(row["temporary_bytes"])]
        for name, row in values.get("losses", {}).items()
    ]
    if losses:
        yield markdown.table(["loss and gradient", "", "temporaries"], losses)


def others(values: Values) -> Iterator[str]:
    """`memory` and `fed`."""
    rows = [
        [name, str(r["images_per_device"]), f"{r['limit_bytes'] / 2**30:.1f} GiB",
         rate(r) if "seconds" in r else r.get("failed", "")]
        for name, r in values.get("memory", {}).items() if "images_per_device" in r
    ]  # fmt: skip
    if rows:
        yield markdown.table(["largest batch", "images per device", "in", ""], rows)
    rows = [
        [name, *(f"{r['images_per_second'][by]:.1f}" for by in ("records", "one_batch")),
         f"{r['ratio']:.3f}"]
        for name, r in values.get("fed", {}).items()
    ]  # fmt: skip
    if rows:
        yield markdown.table(["fed, images/s", "by records", "by one batch", "ratio"], rows)


PARTS: tuple[Callable[[Values], Iterator[str]], ...] = (steps, networks, convolutions, others)


def page(values: Values) -> str:
    """The tables, after the conditions that they share."""
    said = []
    if "ceilings" in values:
        ceilings = values["ceilings"]
        said = ["{devices} x {device}, {dtype}, {classes} classes, JAX {jax}; ".format(**values)]
        said[0] += f"{ceilings['flop_per_second'] / 1e12:.3g} TFLOP/s, "
        said[0] += f"{ceilings['byte_per_second'] / 1e12:.3g} TB/s"
    if differences := values.get("peer", {}).get("differences"):
        far = ", ".join(f"{name} by {value:.1e}" for name, value in differences.items())
        said.append(f"PyTorch {values['peer']['torch']} differs (relative): {far}")
    return "\n\n".join([*said, *(table for part in PARTS for table in part(values))])


def main(arguments: list[str]) -> None:
    if not arguments[1:]:
        raise ConfigError("name the JSON files of the benchmark")
    for name in arguments[1:]:
        try:
            values = json.loads(Path(name).read_text())
            text = page(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{name}: no figures of the benchmark: {error!r}") from error
        print(f"{name}\n\n{text}\n" if text else f"{name}: no table is of this\n")


if __name__ == "__main__":
    cli.run(main)
