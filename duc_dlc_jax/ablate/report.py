"""`--report`: the files of a grid's runs -> a page with a verdict, tables and plots."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import markdown
from duc_dlc_jax.ablate import answers, plots
from duc_dlc_jax.ablate.answers import interval
from duc_dlc_jax.ablate.results import Results
from duc_dlc_jax.ablate.significance import half_width, paired, verdicts
from duc_dlc_jax.ablate.table import SCORES, Result, Table, code, device, host


def write(results: Results, output: str | Path, command: str) -> None:
    """Writes the page, and its plots as PNGs into a folder beside it that is named like it."""
    table, output = Table(results.grid(), results.all()), Path(output)
    drawn = plots.plots(table, results)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        plots.write(drawn, output.with_suffix(""))
    except ImportError:
        logging.warning("no plots: they need matplotlib, pip install 'duc-dlc-jax[plots]'")
        drawn = []
    output.write_text(page(table, results, command, output.stem, drawn))


def page(
    table: Table, results: Results, command: str, folder: str, drawn: Sequence[plots.Plot]
) -> str:
    """The text; command: what makes it. folder: of the plots."""
    parts = [
        _head(table, command),
        answers.verdict(table),
        _main_table(table),
        *answers.differences(table),
        *(f"![{p.text}]({folder}/{p.name})" for p in drawn if p.name != plots.CROPS),
        _crops(table),
        *(f"![{p.text}]({folder}/{p.name})" for p in drawn if p.name == plots.CROPS),
        _per_class(table, "IoU", lambda r: r["val"]["iou"]),
        _per_class(table, "Boundary IoU", lambda r: r["val"]["boundary"]["iou"]),
        _not_done(table, results),
        _single_runs(table),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(table: Table, command: str) -> str:
    every = [r for runs in table.runs.values() for r in runs]
    config, first = every[0]["config"], every[0]
    hours = sum(r["seconds"]["total"] for r in every) / 3600
    devices = ", ".join(f"{n} on {device}" for device, n in table.devices.most_common())
    hosts = sorted({host(r) for r in every} - {""})
    ran_on = "; ".join(
        [
            devices,
            *[f"beside {', '.join(hosts)}"] * bool(hosts),
            ", ".join(sorted({f"JAX {r['hardware']['jax']}" for r in every})),
            _codes(every),
        ]
    )
    train, val = first["images"]
    widths = first["val"]["boundary"]["widths"]
    crops = first["steps"] * config["train"]["batch_size"]
    parts = [
        f"# Ablation on {config['data']['name']}",
        f"**{table.grid.title}.**" if table.grid.title else "",
        _other_budget(table),
        f"Made from the runs' files by\n\n```\n$ {command}\n```",
        f"{len(every)} runs of {len(table.runs)} variants ({ran_on}), "
        f"{hours:.1f} hours in all. Each was trained on {train} images for {first['steps']} "
        f"steps of {config['train']['batch_size']} crops of {config['data']['crop_size']} "
        f"pixels ({crops / train:.0f} epochs, {config['model']['dtype']}, "
        f"{'ImageNet weights' if config['init']['weights'] else 'from scratch'}), and scored "
        f"after its last step on {val} images: {first['val']['protocol']}. "
        f"{widths[:1].upper()}{widths[1:]}. Runs of one seed saw the same "
        f"crops in the same order. {_learning_rate(table)}",
    ]
    return "\n\n".join(part for part in parts if part)


def _codes(every: Sequence[Result]) -> str:
    """The code of the runs, as far as their files say."""
    counts = collections.Counter(code(r) for r in every)
    unknown = counts.pop("", 0)
    said = [f"{n} by {text}" for text, n in counts.most_common()]
    said += [f"the code of {unknown} is not recorded"] * bool(unknown)
    return ", ".join(said)


def _other_budget(table: Table) -> str:
    """That the runs are not as long as the configuration says, or not on such crops."""
    config = config_lib.default().unlock()
    config.update(next(iter(table.runs.values()))[0]["config"])
    had = dict(config_lib.fields(config))
    differ = [
        f"{name}={had[name]} ({value} there)"
        for name, value in table.grid.recipe.items()
        if had[name] != value
    ]
    if not differ:
        return ""
    return f"**Not with the configuration's budget: these runs have {', '.join(differ)}.**"


def _learning_rate(table: Table) -> str:
    """That there is one for all; and, of pre-trained networks, how much each has to learn anew."""
    runs = [found[0] for found in table.runs.values()]
    config = runs[0]["config"]
    rates = sorted({r["config"]["optimizer"]["learning_rate"] for r in runs})
    if len(rates) > 1:
        return ""
    factor = config["optimizer"]["new_layer_multiplier"]
    new_layers = f", {factor:g} times that outside the backbone" if factor != 1 else ""
    said = f"One learning rate serves all variants, {rates[0]:g}{new_layers}, tuned for none here."
    if not config["init"]["weights"]:
        return said
    new = {r["variant"]: _beside_the_backbone(r) / 1e6 for r in runs}
    most = max(new, key=lambda name: new[name])
    return (
        f"{said} What is not backbone starts from random values, {min(new.values()):.1f} to "
        f"{max(new.values()):.1f} million parameters (`{most}`): a short training disfavours those "
        "with more."
    )


def _beside_the_backbone(result: Result) -> int:
    return sum(count for part, count in result["parameters"].items() if part != "backbone")


def _main_table(table: Table) -> str:
    head = ["variant", "upsampling, context", "grid of context", "seeds", *SCORES]
    timed, several = bool(table.device), len(table.devices) > 1
    head += ["parameters", "GMACs", *["train images/s", "label images/s"] * timed, "step memory"]
    head += ["device"] * several
    rows = []
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
                *[_rate(rates[k]) if k in rates else "-" for k in ("train", "label")] * timed,
                _memory(table.memory(name)),
                *[", ".join(table.on(name))] * several,
            ]
        )
    size = "x".join(map(str, next(iter(table.runs.values()))[0]["macs_image"]))
    text = (
        "Mean ± standard deviation over the seeds. GMACs: multiply-adds of the convolutions for an "
        f"image of {size}. {_rates_said(table)} Memory is what the compiled training step needs."
    )
    return "\n".join(["## Scores and costs", "", text, "", markdown.table(head, rows)])


def _rates_said(table: Table) -> str:
    """What rates are shown, and why others are not."""
    left_out = "no rates in the files, out of which they are taken where others used the device"
    if not table.device:
        return f"There are {left_out}."
    said = (
        f"Rates are those of {table.device}: of the training step on a batch that stays there, and "
        "of labelling images from the host."
    )
    without = [name for name in table.runs if not table.rates(name)]
    timed = [n for n in without if any(r["images_per_second"] for r in table.runs[n])]
    if timed:
        said += f" {_listed(timed)}: timed on other devices alone."
    if none := [name for name in without if name not in timed]:
        said += f" {_listed(none)}: {left_out}."
    return said


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _memory(found: Mapping[str, int]) -> str:
    """In GiB, by device where there are several."""
    if len(found) == 1:
        return f"{next(iter(found.values())) / 2**30:.1f} GiB"
    return ", ".join(f"{size / 2**30:.1f} GiB on {name}" for name, size in found.items())


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _per_class(table: Table, title: str, of: Callable[[Result], dict[str, float | None]]) -> str:
    """Classes from the rarest on, of the variants of the main questions."""
    names = table.shown()
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
    """Boundary IoU of each crop, and the main questions asked of them."""
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
    questions = table.main_questions()
    pairs = [(found.get(a, {}), found.get(b, {})) for a, b, _ in questions]
    differences = [paired(_over_crops(a), _over_crops(b)) for a, b in pairs]
    told, lines = verdicts(differences), []
    for i, (a, b, question) in enumerate(questions):
        if common := sorted(pairs[i][0].keys() & pairs[i][1].keys()):
            one, two = (np.mean([runs[seed] for seed in common], axis=0) for runs in pairs[i])
            lines.append(
                f"- `{b}` - `{a}` ({question}): higher in {int(np.sum(two > one))} of {len(first)} "
                f"crops; mean over the crops {interval(differences[i])} points, {len(common)} "
                f"seed{'s' * (len(common) != 1)}, {told[i]}."
            )
    if lines:
        parts += ["", "Verdicts as above, after Holm's correction over the family:", "", *lines]
    return "\n".join(parts)


def _over_crops(runs: dict[int, list[float]]) -> dict[int, float]:
    """Seed -> mean over the crops that are not ignored."""
    return {seed: float(np.nanmean(values)) for seed, values in runs.items()}


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
            device(r),
        ]
        for name, runs in table.runs.items()
        for r in runs
    ]
    head = ["variant", "seed", *SCORES, "last loss", "minutes", "device"]
    return "## Single runs\n\n" + markdown.table(head, rows)
