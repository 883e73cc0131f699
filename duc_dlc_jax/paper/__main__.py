"""`python -m duc_dlc_jax.paper --output=docs/results/paper.md`: a page on each row of the tables.

Finished runs are the files `RUN.json` of --runs that `evaluate --checkpoint=latest
--protocol=single,multi_scale --json=RUN.json` wrote; RUN is a training of configs/paper.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from duc_dlc_jax import cli, hours, markdown, protocols, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.ablate.results import CIRCUMSTANCES
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.builders import sources
from duc_dlc_jax.paper.tables import LEFT_OPEN, SLIPS, TABLES, Row, Table

WITHIN = 0.5  # points of mIoU and PA that a reproduced row may be away: the paper gives no spread
CONFIG, GRID = "configs/paper.py", "configs/ablation_camvid.py"
# Fields that decide no score; the seed, for the paper has none; and which weights, if any.
BESIDE = (*CIRCUMSTANCES, "seed", "init.source", "train.eval_every", "mesh.data", "mesh.space")
EVALUATED = ("step", "checkpoint", "split", "protocols", "config")  # of `evaluate`'s JSON
NO_WEIGHTS = "no ImageNet weights of 269 layers by name, so `init.weights=FILE`"
NOT_RUN = "needs the data set and the hours above"
QUOTED = "another method, quoted; not trained here"


def finished(folder: Path, run: str) -> dict[str, Any] | None:
    """What `evaluate` wrote for a run; raises ConfigError for a file that lacks `EVALUATED`."""
    path = folder / f"{run}.json"
    if not path.exists():
        return None
    written = json.loads(path.read_text())
    if absent := [name for name in EVALUATED if name not in written]:
        raise ConfigError(
            f"{path} lacks {', '.join(absent)}: python -m duc_dlc_jax.evaluate --workdir=DIR "
            f"--checkpoint=latest --protocol=single,multi_scale --json={path}"
        )
    return written


def changes(written: dict[str, Any], row: Row) -> list[str]:
    """In what a finished run is not the training of configs/paper.py, or not tested as the row is.

    The numbers of images are the official ones, give or take what known releases differ by.
    """
    wanted = config_lib.load(f"{CONFIG}:{row.run}")
    had = config_lib.from_json(json.dumps(written["config"]))
    values = dict(config_lib.fields(had))
    how = [
        f"{name}={values[name]!r}"
        for name, value in config_lib.fields(wanted)
        if values[name] != value and name not in BESIDE and not name.startswith("eval.")
    ]
    if not (had.init.weights or had.init.checkpoint):
        how.append("from scratch")
    source, split = sources.SOURCES[wanted.data.name], wanted.data.eval_split
    trained, scored = source.counts[wanted.data.train_split], source.counts[split]
    least, steps, most = (
        optimizers.total_steps(had, trained + more)
        for more in (-source.tolerance, 0, source.tolerance)
    )
    if not least <= written["step"] <= most:
        how.append(f"step {written['step']:,} of {steps:,}")
    if written["checkpoint"] != "latest" and not written["checkpoint"].isdigit():
        how.append(f"checkpoint={written['checkpoint']}")
    figures = written["protocols"][row.protocol]
    tested = protocols.Protocol.from_config(protocols.select(wanted, row.protocol, []))
    if figures["protocol"] != tested.sentence():
        how.append(f"tested by: {figures['protocol']}")
    images = figures["images"]
    if written["split"] != split or abs(images - scored) > source.tolerance:
        how.append(f"on {images:,} images of {written['split']}, not {scored:,} of {split}")
    return how


def verdict(row: Row, written: dict[str, Any] | None, server: bool) -> str:
    """reproduced, different (how) or not run (why)."""
    if not row.run:
        return QUOTED + (f" (nearest: `{row.near}` of {GRID})" if row.near else "")
    if written is None:
        missing = f"{NO_WEIGHTS}; " if row.run.endswith("r269") else ""
        return f"not run: {missing}{NOT_RUN}" + ("; the server scores the test split" * server)
    if row.protocol not in written["protocols"]:
        return f"not run: {row.run}.json lacks {row.protocol}"
    figures = written["protocols"][row.protocol]
    pairs = [("mIoU", row.miou), ("PA", row.pa)]
    apart = [(name, 100 * figures[name], value) for name, value in pairs if value is not None]
    said = ", ".join(f"{name} {ours:.2f} ({ours - value:+.2f})" for name, ours, value in apart)
    how = changes(written, row)
    how += ["on val, not by the test server"] * server
    close = all(abs(ours - value) <= WITHIN for _, ours, value in apart)
    if close and not how:
        return f"reproduced: {said}"
    return "; ".join([f"different: {said}", *how])


def trainings(runs: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """The table of trainings with their predicted hours, and these by run, as they are shown."""
    found = {run: hours.predict(config_lib.load(f"{CONFIG}:{run}")) for run in runs}
    devices = next(iter(found.values()))["devices"]
    shown = {
        run: [f"{d['hours']:,.1f}{'*' * d['extrapolated']}" for d in figures["devices"]]
        for run, figures in found.items()
    }
    head = ["training", "steps", "GMACs a crop", *(f"hours [{i + 1}]" for i in range(len(devices)))]
    rows = [
        [f"`{CONFIG}:{run}`", f"{figures['steps']:,}", f"{figures['gmacs']:.2f}", *shown[run]]
        for run, figures in found.items()
    ]
    notes = [
        f"- [{i + 1}] {d['measured']}: {d['images_per_second']:.4g} images/s, {d['gmacs']:.2f} "
        f"GMACs a crop{'; ' + d['note'] if d['note'] else ''} "
        "([performance.md](../performance.md))."
        for i, d in enumerate(devices)
    ]
    absent = ", ".join(next(iter(found.values()))["not_measured"])
    text = (
        "Hours = steps x 16 crops x GMACs of a crop / (images/s x GMACs of a crop as timed) / "
        "3600, from steps that were timed on a batch that stays on the device:"
    )
    after = (
        "Unmarked hours are measured speed, at that network and crop; * is extrapolated by "
        "multiply-adds alone. Evaluations, checkpoints and a slow input come on top; n devices "
        f"take an n-th at best. Not measured: {absent}. For a TPU slice `describe --topology` "
        "compiles the step and predicts from published rates ([clusters.md](../clusters.md)). By "
        "`python -m duc_dlc_jax.describe --config=configs/paper.py:RUN --hours`."
    )
    return "\n\n".join([text, "\n".join(notes), markdown.table(head, rows), after]), shown


def table(which: Table, folder: Path, predicted: dict[str, list[str]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.{which.digits}f}"

    head, rows = ["method", "mIoU", "PA", "Final Score", "here"], []
    head += ["training, protocol", "hours [1]"]
    for row in which.rows:
        written = finished(folder, row.run) if row.run else None
        rows.append(
            [
                row.method,
                *map(number, (row.miou, row.pa, row.final)),
                verdict(row, written, which.server),
                f"`{row.run}`, `{row.protocol}`" if row.run else "",
                predicted[row.run][0] if row.run else "",
            ]
        )
    return f"## Table {which.number}: {which.title}\n\n{markdown.table(head, rows)}"


def page(folder: Path) -> str:
    """The page; folder: with the files of finished runs."""
    runs = list(dict.fromkeys(row.run for t in TABLES for row in t.rows if row.run))
    done = [run for run in runs if finished(folder, run)]
    costs, predicted = trainings(runs)
    slips = markdown.table(["place", "the paper", "here"], SLIPS)
    parts = [
        "# The paper's tables",
        "Each row of the four tables of Sediqi and Lee (2021), in percent, and what this project "
        "has of it. Made from the configurations and from the JSON of finished runs by",
        "```\n$ python -m duc_dlc_jax.paper --output=docs/results/paper.md\n```",
        f"{len(done)} of {len(runs)} trainings have been run. *Reproduced* is within {WITHIN} "
        "points in mIoU and PA with the configuration as it is, from pre-trained weights, after "
        "its last step, by the row's protocol on every image; *different* says in what it was not. "
        "What was trained instead, on other data: [camvid.md](camvid.md), "
        "[ablation.md](ablation.md), [scenes.md](scenes.md).",
        "## The trainings",
        "```\n"
        "$ python -m duc_dlc_jax.main --config=configs/paper.py:RUN --workdir=runs/RUN\n"
        "$ python -m duc_dlc_jax.evaluate --workdir=runs/RUN --protocol=single,multi_scale \\\n"
        "    --checkpoint=latest --json=docs/results/paper/RUN.json\n"
        "$ python -m duc_dlc_jax.submit --workdir=runs/cityscapes_r101 --split=test \\\n"
        "    --checkpoint=latest --protocol=multi_scale --output=cityscapes.zip\n"
        "```",
        "RUN is a name of this table; on a pod the first line goes through the scripts of "
        "[clusters.md](../clusters.md). `latest` is the last step: `best`, the default, would be "
        "chosen by its score on the very images that are reported.",
        costs,
        "### What the paper leaves open",
        "The trainings take from the paper what it says: crops of 480 on ADE20K and "
        "PASCAL-Context, scales 0.5 to 2, rate 1e-3, poly 0.9, momentum 0.9, decay 1e-4, 120 and "
        "80 epochs. The rest, with the marks of [network.md](../network.md):",
        "\n".join(f"- {line}" for line in LEFT_OPEN),
        *(table(t, folder, predicted) for t in TABLES),
        "## Slips in the paper",
        "So that nobody chases them. Places are sections, equations and tables of the paper.",
        slips,
    ]
    return "\n\n".join(parts) + "\n"


def main(_) -> None:
    args = flags.FLAGS
    storage.check(args.output, write=True, flag="--output", file=True)
    storage.write_text(Path(args.output), page(Path(args.runs)))
    print(f"written: {args.output}")


if __name__ == "__main__":
    flags.DEFINE_string("runs", "docs/results/paper", "Folder with RUN.json of finished runs.")
    flags.DEFINE_string("output", "paper.md", "The page.")
    cli.run(main)
