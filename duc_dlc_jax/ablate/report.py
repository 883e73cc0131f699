"""`--report`: the files of a grid's runs -> a page with tables, paired differences and plots."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import markdown
from duc_dlc_jax.ablate.grid import Grid
from duc_dlc_jax.ablate.results import CIRCUMSTANCES, Results
from duc_dlc_jax.ablate.statistics import Difference, half_width, paired, verdicts
from duc_dlc_jax.config import ConfigError

Result = dict[str, Any]
SCORES: dict[str, Callable[[Result], float]] = {
    "mIoU": lambda r: r["val"]["mIoU"],
    "PA": lambda r: r["val"]["PA"],
    "boundary IoU": lambda r: r["val"]["boundary"]["mean_iou"],
    "boundary F": lambda r: r["val"]["boundary"]["mean_f"],
}
COMPARED = ("mIoU", "PA", "boundary IoU")
CROPS = "crops.png"


class Table:
    """The ended runs by variant, in the grid's order.

    Raises ConfigError where there are none, and where they had different budgets.
    """

    def __init__(self, grid: Grid, found: Sequence[Result]):
        if not found:
            raise ConfigError("no run has ended yet: there is nothing to report")
        listed = {variant.name: variant for variant in grid.variants}
        unknown = sorted({r["variant"] for r in found} - listed.keys())
        if unknown:
            raise ConfigError(f"runs of variants that grid.json lacks: {', '.join(unknown)}")
        _check_budgets(found, listed)
        by_name = collections.defaultdict(list)
        for result in sorted(found, key=lambda r: r["seed"]):
            by_name[result["variant"]].append(result)
        self.runs = {name: by_name[name] for name in listed if by_name[name]}
        self.grid = grid
        devices = collections.Counter(r["hardware"]["device"] for r in found)
        self.device = devices.most_common(1)[0][0]  # whose rates are shown
        self.devices = devices

    def scores(self, name: str, score: str) -> dict[int, float]:
        """Seed -> score of a variant's runs."""
        return {r["seed"]: SCORES[score](r) for r in self.runs.get(name, [])}

    def rates(self, name: str) -> dict[str, float]:
        """Median images/s, on the device that most runs had; empty where it had none."""
        rows = [r for r in self.runs[name] if r["hardware"]["device"] == self.device]
        kinds = rows[0]["images_per_second"] if rows else ()
        return {k: float(np.median([r["images_per_second"][k] for r in rows])) for k in kinds}

    def gmacs(self, name: str) -> float:
        return sum(self.runs[name][0]["macs"].values()) / 1e9

    def missing(self) -> list[tuple[str, list[int]]]:
        """Variants and those of their seeds that have not ended."""
        rows = []
        for variant in self.grid.variants:
            done = {r["seed"] for r in self.runs.get(variant.name, [])}
            rows.append((variant.name, [s for s in range(variant.seeds) if s not in done]))
        return [row for row in rows if row[1]]

    def comparisons(self) -> list[tuple[str, str, str]]:
        """(first, second, question) of the grid whose variants both have runs."""
        return [c for c in self.grid.comparisons if c[0] in self.runs and c[1] in self.runs]

    def asked_about(self) -> list[str]:
        """The variants that the grid's questions are about, or all, in the grid's order."""
        asked = {name for question in self.comparisons() for name in question[:2]}
        return [name for name in self.runs if name in asked] or list(self.runs)

    def crops(self, name: str) -> dict[int, list[float]]:
        """Seed -> boundary IoU of each crop, of runs that have them; NaN: all ignored."""
        return {
            r["seed"]: [np.nan if c["boundary_iou"] is None else c["boundary_iou"] for c in kept]
            for r in self.runs[name]
            if (kept := r.get("crops"))
        }

    def crop_runs(self) -> dict[str, int]:
        """Variant -> its lowest seed with crops, of those that the questions are about."""
        return {n: min(self.crops(n)) for n in self.asked_about() if self.crops(n)}


def _check_budgets(found: Sequence[Result], listed: dict) -> None:
    """Raises ConfigError unless the runs differ in what their variants change, and in seeds."""
    first: dict[str, tuple[str, Any]] = {}
    for result in found:
        name = f"{result['variant']}-seed{result['seed']}"
        changed = {*listed[result["variant"]].changes, "seed", *CIRCUMSTANCES}
        config = config_lib.default().unlock()
        config.update(result["config"])
        for field, value in config_lib.fields(config):
            if field in changed:
                continue
            other, expected = first.setdefault(field, (name, value))
            if _plain(value) != _plain(expected):
                raise ConfigError(
                    f"runs of two budgets: {field} is {expected!r} in {other} and {value!r} in "
                    f"{name}"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def write(results: Results, output: str | Path, command: str) -> None:
    """Writes the page, and its plots as PNGs into a folder beside it that is named like it."""
    table, output = Table(results.grid(), results.all()), Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, str]] = []
    try:
        from duc_dlc_jax.ablate import plots

        pictures = plots.write(table, output.with_suffix(""), results)
    except ImportError:
        logging.warning("no plots: they need matplotlib, pip install 'duc-dlc-jax[plots]'")
    parts = [
        _head(table, command),
        _main_table(table),
        *_differences(table),
        *(f"![{text}]({output.stem}/{name})" for name, text in pictures if name != CROPS),
        _crops(table),
        *(f"![{text}]({output.stem}/{name})" for name, text in pictures if name == CROPS),
        _per_class(table, "IoU", lambda r: r["val"]["iou"]),
        _per_class(table, "Boundary IoU", lambda r: r["val"]["boundary"]["iou"]),
        _not_done(table, results),
        _single_runs(table),
    ]
    output.write_text("\n\n".join(part for part in parts if part) + "\n")


def _head(table: Table, command: str) -> str:
    every = [r for runs in table.runs.values() for r in runs]
    config, first = every[0]["config"], every[0]
    hours = sum(r["seconds"]["total"] for r in every) / 3600
    devices = ", ".join(f"{n} on {device}" for device, n in table.devices.most_common())
    versions = ", ".join(sorted({f"JAX {r['hardware']['jax']}" for r in every}))
    train, val = first["images"]
    widths = first["val"]["boundary"]["widths"]
    crops = first["steps"] * config["train"]["batch_size"]
    return "\n".join(
        [
            f"# Ablation on {config['data']['name']}",
            "",
            "Made from the runs' files by",
            "",
            f"```\n$ {command}\n```",
            "",
            f"{len(every)} runs of {len(table.runs)} variants ({devices}; {versions}), "
            f"{hours:.1f} hours in all. Each was trained on {train} images for {first['steps']} "
            f"steps of {config['train']['batch_size']} crops of {config['data']['crop_size']} "
            f"pixels ({crops / train:.0f} epochs, {config['model']['dtype']}, "
            f"{'ImageNet weights' if config['init']['weights'] else 'from scratch'}), and scored "
            f"after its last step on {val} images: {first['val']['protocol']}. "
            f"{widths[:1].upper()}{widths[1:]}. Runs of one seed saw the same "
            "crops in the same order.",
        ]
    )


def _main_table(table: Table) -> str:
    head = ["variant", "upsampling, context", "grid of context", "seeds", *SCORES]
    timed, rows = any(table.rates(name) for name in table.runs), []
    head += ["parameters", "GMACs", *["train images/s", "label images/s"] * timed, "step memory"]
    for name, runs in table.runs.items():
        model, rates = runs[0]["config"]["model"], table.rates(name)
        values = [list(table.scores(name, score).values()) for score in SCORES]
        rows.append(
            [
                f"`{name}`",
                f"{model['upsampling']}, {model['context']}",
                list(runs[0]["grids"])[-1].removeprefix("context ").strip("()"),
                str(len(runs)),
                *(_spread(v) for v in values),
                f"{sum(runs[0]['parameters'].values()):,}",
                f"{table.gmacs(name):.1f}",
                *[_rate(rates[k]) if k in rates else "" for k in ("train", "label")] * timed,
                f"{max(r['step_bytes_per_device'] for r in runs) / 2**30:.1f} GiB",
            ]
        )
    size = "x".join(map(str, next(iter(table.runs.values()))[0]["macs_image"]))
    said = (
        f"Rates are those of {table.device}: of the training step on a batch that stays there, and "
        "of labelling images from the host. "
    )
    text = (
        "Mean ± standard deviation over the seeds. GMACs: multiply-adds of the convolutions for an "
        f"image of {size}. {said * timed}Memory is what the compiled training step needs."
    )
    return "\n".join(["## Scores and costs", "", text, "", markdown.table(head, rows)])


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _differences(table: Table) -> list[str]:
    """The questions of the grid: a table of paired differences, and their verdicts in words."""
    asked = table.comparisons()
    if not asked:
        return []
    family = {
        score: [paired(table.scores(a, score), table.scores(b, score)) for a, b, _ in asked]
        for score in COMPARED
    }
    told = {score: verdicts(found) for score, found in family.items()}
    rows = [
        [
            f"`{b}` - `{a}`",
            question,
            str(len(family["mIoU"][i].values)),
            *(f"{_interval(family[s][i])}, {told[s][i]}" for s in COMPARED),
        ]
        for i, (a, b, question) in enumerate(asked)
    ]
    sentences = []
    for score in COMPARED:
        groups = collections.defaultdict(list)
        for (a, b, _), verdict in zip(asked, told[score], strict=True):
            groups[verdict].append(f"`{b}` - `{a}`")
        said = "; ".join(f"{verdict}: {', '.join(pairs)}" for verdict, pairs in groups.items())
        sentences.append(f"- **{score}**: {said}.")
    text = (
        "Mean difference over the seeds that both variants have, in points (hundredths), with its "
        "95% confidence interval by Student's t. *Higher* and *lower* exceed the noise of the "
        f"seeds at 5% over all {len(asked)} questions together (Holm); *not told apart* does not "
        "say that there is no difference."
    )
    head = ["difference", "question", "seeds", *COMPARED]
    first = "\n".join(["## What the differences say", "", text, "", markdown.table(head, rows)])
    return [first, "\n".join(sentences)]


def _interval(difference: Difference) -> str:
    if not difference.values:
        return "no common seed"
    if len(difference.values) < 2:
        return f"{100 * difference.mean:+.2f}"
    return f"{100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f}"


def _per_class(table: Table, title: str, of: Callable[[Result], dict[str, float | None]]) -> str:
    """Classes from the rarest on, of the variants that the grid's questions are about."""
    names = table.asked_about()
    pixels = next(iter(table.runs.values()))[0]["val"]["pixels"]
    total, rows = sum(pixels.values()), []
    for label in sorted(pixels, key=lambda c: pixels[c]):
        means = []
        for name in names:
            values = [v for v in (of(r)[label] for r in table.runs[name]) if v is not None]
            width = half_width(values)
            text = f"{np.mean(values):.3f}" if values else ""
            means.append(f"{text} ± {width:.3f}" if values and np.isfinite(width) else text)
        rows.append([label, f"{pixels[label] / total:.2%}", *means])
    head = ["class", "share of pixels", *(f"`{name}`" for name in names)]
    note = "Mean over the seeds with its 95% confidence interval, the rarest class first."
    return "\n".join([f"## {title} per class", "", note, "", markdown.table(head, rows)])


def _crops(table: Table) -> str:
    """Boundary IoU of each crop, and the grid's questions asked of them."""
    found = {name: table.crops(name) for name in table.crop_runs()}
    if not found:
        return ""
    first = next(r["crops"] for r in table.runs[next(iter(found))] if r.get("crops"))
    means = {name: np.mean(list(seeds.values()), axis=0) for name, seeds in found.items()}
    rows = [
        [
            str(k + 1),
            f"{crop['name']}, {crop['left']}, {crop['top']}",
            *(f"{mean[k]:.3f}" for mean in means.values()),
        ]
        for k, crop in enumerate(first)
    ]
    rows.append(["", "mean", *(f"{np.nanmean(mean):.3f}" for mean in means.values())])
    seeds = ", ".join(f"`{name}` {len(runs)}" for name, runs in found.items())
    text = (
        f"{len(first)} squares of {first[0]['side']} pixels of the evaluation split, chosen from "
        "the split's order and its labels alone, before any prediction was seen: the rule is "
        "docs/evaluation.md's, *Crops*. Boundary IoU of each as if it were an image, 2% of its own "
        f"diagonal wide, mean over the seeds ({seeds})."
    )
    head = ["crop", "image, left, top", *(f"`{name}`" for name in found)]
    parts = ["## The same crops through each network", "", text, "", markdown.table(head, rows)]
    asked = [c for c in table.comparisons() if c[0] in found and c[1] in found]
    over_crops = {n: {s: float(np.nanmean(v)) for s, v in found[n].items()} for n in found}
    differences = [paired(over_crops[a], over_crops[b]) for a, b, _ in asked]
    for (a, b, question), difference, verdict in zip(
        asked, differences, verdicts(differences), strict=True
    ):
        more, seeds = int(np.sum(means[b] > means[a])), len(difference.values)
        parts += [""] * (not parts[-1].startswith("- ")) + [
            f"- `{b}` - `{a}` ({question}): higher in {more} of {len(first)} crops; mean over the "
            f"crops {_interval(difference)} points, {seeds} seed{'s' * (seeds != 1)}, {verdict}."
        ]
    return "\n".join(parts)


def _not_done(table: Table, results: Results) -> str:
    failed = results.failures()
    lines = [
        f"- `{name}`: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        for name, seeds in table.missing()
    ]
    lines += [f"- `{name}` failed: {why}" for name, why in failed.items()]
    return "## Runs that were not done\n\n" + ("\n".join(lines) or "None: the grid is complete.")


def _single_runs(table: Table) -> str:
    rows = [
        [
            f"`{name}`",
            str(r["seed"]),
            *(f"{score(r):.4f}" for score in SCORES.values()),
            f"{r['curve'][-1]['loss']:.4f}",
            f"{r['seconds']['total'] / 60:.1f}",
            r["hardware"]["device"],
        ]
        for name, runs in table.runs.items()
        for r in runs
    ]
    head = ["variant", "seed", *SCORES, "last loss", "minutes", "device"]
    return "## Single runs\n\n" + markdown.table(head, rows)
