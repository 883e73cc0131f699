"""The ended runs of a grid by variant: their scores, costs, and what they ran on."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.ablate.grid import Grid, Question
from duc_dlc_jax.ablate.results import budget
from duc_dlc_jax.config import ConfigError

Result = dict[str, Any]
SCORES: dict[str, Callable[[Result], float]] = {
    "mIoU": lambda r: r["val"]["mIoU"],
    "PA": lambda r: r["val"]["PA"],
    "boundary IoU": lambda r: r["val"]["boundary"]["mean_iou"],
    "boundary F": lambda r: r["val"]["boundary"]["mean_f"],
}


class Table:
    """The ended runs by variant, in the grid's order.

    Raises ConfigError where there are none, and where they had different budgets.
    """

    def __init__(self, grid: Grid, found: Sequence[Result]):
        if not found:
            raise ConfigError("no run has ended yet: there is nothing to report")
        grid.check(r["variant"] for r in found)
        listed = {variant.name: variant for variant in grid.variants}
        _check_budgets(found, listed)
        by_name = collections.defaultdict(list)
        for result in sorted(found, key=lambda r: r["seed"]):
            by_name[result["variant"]].append(result)
        self.runs = {name: by_name[name] for name in listed if by_name[name]}
        self.grid = grid
        self.devices = collections.Counter(map(device, found))
        timed = collections.Counter(device(r) for r in found if r["images_per_second"])
        self.device = max(timed, key=lambda name: timed[name], default="")  # whose rates are shown

    def scores(self, name: str, score: str) -> dict[int, float]:
        """Seed -> score of a variant's runs."""
        return {r["seed"]: SCORES[score](r) for r in self.runs.get(name, [])}

    def on(self, name: str) -> list[str]:
        """The devices of a variant's runs, each once."""
        return list(dict.fromkeys(map(device, self.runs[name])))

    def rates(self, name: str) -> dict[str, float]:
        """Median images/s on `device`; empty where the variant's runs there have none."""
        rows = [r["images_per_second"] for r in self.runs[name] if device(r) == self.device]
        rows = [row for row in rows if row]
        return {k: float(np.median([row[k] for row in rows])) for k in (rows[0] if rows else ())}

    def memory(self, name: str) -> dict[str, int]:
        """Device -> the most bytes that the step of a variant's runs there needs."""
        found: dict[str, int] = {}
        for r in self.runs[name]:
            found[device(r)] = max(found.get(device(r), 0), r["step_bytes_per_device"])
        return found

    def gmacs(self, name: str) -> float:
        return sum(self.runs[name][0]["macs"].values()) / 1e9

    def missing(self) -> list[tuple[str, list[int]]]:
        """Variants and those of their seeds that have not ended."""
        rows = []
        for variant in self.grid.variants:
            done = {r["seed"] for r in self.runs.get(variant.name, [])}
            rows.append((variant.name, [s for s in range(variant.seeds) if s not in done]))
        return [row for row in rows if row[1]]

    def has_runs(self, question: Question) -> bool:
        """Whether both of its variants have any."""
        return question[0] in self.runs and question[1] in self.runs

    def unlike(self, first: str, second: str) -> bool:
        """Whether runs of one seed of the two had other devices or, as far as known, commits."""
        seconds = {r["seed"]: r for r in self.runs[second]}
        pairs = [(r, seconds[r["seed"]]) for r in self.runs[first] if r["seed"] in seconds]
        return any(_differ(of(a), of(b)) for a, b in pairs for of in (_kind, _cpu, _commit))

    def main_questions(self) -> tuple[Question, ...]:
        """Those of the first family that has runs; of none, where no family has."""
        families = self.grid.comparisons.values()
        return next((rows for rows in families if any(map(self.has_runs, rows))), ())

    def shown(self) -> list[str]:
        """The variants of the main questions, or all, in the grid's order.

        What has a column or a colour for each variant is of these alone.
        """
        asked = {n for question in self.main_questions() for n in question[:2]}
        return [name for name in self.runs if name in asked] or list(self.runs)

    def crops(self, name: str) -> dict[int, list[float]]:
        """Seed -> boundary IoU of each crop, of runs that have them; NaN: all ignored."""
        return {
            r["seed"]: [np.nan if c["boundary_iou"] is None else c["boundary_iou"] for c in kept]
            for r in self.runs[name]
            if (kept := r.get("crops"))
        }

    def crop_runs(self) -> dict[str, int]:
        """Variant -> its lowest seed with crops, of those that are shown."""
        return {n: min(self.crops(n)) for n in self.shown() if self.crops(n)}


def device(result: Result) -> str:
    """What a run was computed on, as far as its file says."""
    hardware = result["hardware"]
    own = _processor(hardware) if hardware.get("platform") == "cpu" else ""
    return own or hardware["device"]


def host(result: Result) -> str:
    """The processor beside an accelerator; empty where the run's file does not say."""
    hardware = result["hardware"]
    return "" if hardware.get("platform") == "cpu" else _processor(hardware)


def code(result: Result) -> str:
    """Version and commit that a run was made with, as far as its file says."""
    found = result.get("code", {})
    if "commit" not in found:
        return f"version {found['version']}" if found else ""
    dirty = " with changes" if found["dirty"] else ""
    return f"version {found['version']}, commit {found['commit'][:8]}{dirty}"


def _processor(hardware: dict[str, Any]) -> str:
    if "cpu" not in hardware:
        return ""
    return f"{hardware['cpu']}, {hardware['usable_cores']} of {hardware['cores']} cores"


def _kind(result: Result) -> str:
    return result["hardware"]["device"]


def _cpu(result: Result) -> str:
    """The processor that computed, where the file says."""
    hardware = result["hardware"]
    return hardware.get("cpu", "") if hardware.get("platform") == "cpu" else ""


def _commit(result: Result) -> str:
    return result.get("code", {}).get("commit", "")


def _differ(first: str, second: str) -> bool:
    return bool(first and second) and first != second


def _check_budgets(found: Sequence[Result], listed: dict) -> None:
    """Raises ConfigError unless the runs differ in what their variants change, and in seeds."""
    first: dict[str, tuple[str, Any]] = {}
    for result in found:
        name = f"{result['variant']}-seed{result['seed']}"
        changed = {*listed[result["variant"]].changes, "seed"}
        config = config_lib.default().unlock()
        config.update(result["config"])
        shared, had = budget(config), dict(config_lib.fields(config))
        for field, value in listed[result["variant"]].changes.items():
            if _plain(had[field]) != _plain(value):
                raise ConfigError(
                    f"{name} was run with {field}={had[field]!r}; now it is {value!r}"
                )
        if digest := result.get("weights_sha256"):
            shared["init.weights, by SHA-256,"] = digest
        for field, value in shared.items():
            if field.partition(",")[0] in changed:
                continue
            other, expected = first.setdefault(field, (name, value))
            if _plain(value) != _plain(expected):
                raise ConfigError(
                    f"runs of two budgets: {field} is {expected!r} in {other} and {value!r} in "
                    f"{name}"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
