"""`python -m duc_dlc_jax.ablate --config=configs/ablation_camvid.py --workdir=DIR`.

Trains every variant that the configuration's `get_variants` names, each with its seeds, in order,
and writes `DIR/runs/NAME-seedN.json` when one ends; the same command goes on where it stopped,
within a run from its last checkpoint, and several at once share the runs among them.
`--report` makes the tables and plots from these files.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, storage
from duc_dlc_jax.ablate import grid
from duc_dlc_jax.ablate.results import Results, weights_digest
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.progress import clock


def listed(runs: list[grid.Run], results: Results) -> str:
    """A line per run: its name, what it changes, and its score or how far it is."""
    held = results.claims.holders()
    lines = []
    for run in runs:
        done, failure = results.done(run), results.failure(run)
        if done:
            state = f"mIoU {done['val']['mIoU']:.4f}"
        elif run.name in held:
            state = f"running on {held[run.name]}"
        elif failure:
            state = f"failed, {failure}"
        else:
            state = "begun" if results.begun(run) else "to do"
        lines.append(f"{run.name:<28}{state:<13} {grid.text_of(run.variant.changes)}")
    return "\n".join(lines)


def train_all(config, runs: list[grid.Run], results: Results, limit: float, weights: bool) -> int:
    """Trains what is not done, as long as a run is likely to end within `limit` seconds.

    Returns the number of runs that are left. A run that fails is noted, and the next one starts;
    so is the next one taken where another process works on a run.
    """
    cli.use_deterministic_kernels(config.train.deterministic)
    segmenter.enable_dtype(config.model)
    from duc_dlc_jax.ablate import runner  # late: --list and --report need no accelerator

    start, longest, failed = time.monotonic(), {}, set()
    data: Any = None
    trainer: Any = None
    current = ""
    while True:
        with results.claimed(runs, failed, current) as run:
            left = len(results.left(runs))
            if run is None:
                return left
            name, spent = run.variant.name, time.monotonic() - start
            expected = longest.get(name, max(longest.values(), default=0.0))
            if spent + expected > limit:
                print(f"stopping after {clock(spent)}: {run.name} would take {clock(expected)}")
                return left
            print(f"{run.name} starts, {left} of {len(runs)} runs are left", flush=True)
            own, begin = run.variant.config(config, run.seed), time.monotonic()
            results.check(run, own)  # again: another process may have begun it
            try:
                if data is None or not data.serves(own.data):
                    data = runner.Data(own.data)
                if name != current:
                    trainer, current = None, ""  # frees the last one's memory
                    trainer, current = runner.Trainer(own, data), name
                result = trainer.run(own, results.files(run, weights))
            except (RuntimeError, FloatingPointError) as error:  # XLA's errors are RuntimeErrors
                results.write_failure(run, error)
                failed.add(run.name)
                print(f"{run.name} failed: {results.failure(run)}", flush=True)
                continue
            result = {"variant": name, "note": run.variant.note, **result}
            results.write(run, result | {"changes": dict(run.variant.changes)})
            longest[name] = max(time.monotonic() - begin, result["seconds"]["total"])
            print(f"{ended(run, result)}  in {clock(longest[name])}", flush=True)


def ended(run: grid.Run, result: dict[str, Any]) -> str:
    val = result["val"]
    boundary = val["boundary"]["mean_iou"]
    return f"{run.name}: mIoU {val['mIoU']:.4f}  PA {val['PA']:.4f}  boundary IoU {boundary:.4f}"


def conclude(runs: list[grid.Run], results: Results) -> None:
    """Says how far the runs are; raises SystemExit where some failed."""
    held = results.claims.holders()
    left = results.left(runs)
    others = sum(run.name in held for run in left)
    elsewhere = f", {others} running in other processes" if others else ""
    done = f"{len(runs) - len(left)} of {len(runs)} runs are done"
    print(f"{done}{elsewhere}; the same command goes on")
    if failed := [run.name for run in left if results.failure(run)]:
        raise SystemExit(f"error: failed: {', '.join(failed)}; --list says why")


def report_command(config: str, workdir: os.PathLike[str], output: str) -> str:
    """What the page says that it was made by: a workdir outside of docs/ is nobody else's."""
    committed = os.path.relpath(workdir).split(os.sep)[0] == "docs"
    words = ["python -m duc_dlc_jax.ablate --report", *[f"--config={config}"] * bool(config)]
    words += [f"--workdir={os.path.relpath(workdir) if committed else 'DIR'}"]
    return " ".join([*words, f"--output={output}"])


def write_report(results: Results, output: str, whole: grid.Grid | None, command: str) -> None:
    """whole: the grid as it is now, which may have grown since the runs."""
    from duc_dlc_jax.ablate import report  # late: SciPy and plots

    if whole and results.all():  # else a mistyped workdir would be made
        results.write_grid(whole)
    report.write(results, output, command)
    print(f"written: {output}")


def main(_) -> None:
    args = flags.FLAGS
    workdir = storage.local("--workdir", args.workdir)
    results = Results(workdir)
    base = args.config
    path = config_flags.get_config_filename(args["config"]) if base is not None else ""
    whole = grid.load(path) if path else None
    if args.report:
        storage.check(args.output, write=True, flag="--output", file=True)
        write_report(results, args.output, whole, report_command(path, workdir, args.output))
        return
    if base is None or whole is None:
        raise ConfigError("--config=FILE is missing; see configs/ablation_camvid.py")
    try:
        seeds = list(dict.fromkeys(map(int, args.seeds))) or None
    except ValueError as error:
        raise ConfigError(f"--seeds={','.join(args.seeds)}; allowed: 0,1,2") from error
    runs = grid.runs(whole.variants, args.only, seeds)
    digest = functools.cache(weights_digest)
    for run in runs:  # before anything is compiled
        own = run.variant.config(base, run.seed)
        known = "" if args.list else digest(own.init.weights, own.init.source)
        results.check(run, own, known)
    if args.list:
        print(listed(runs, results))
        return
    storage.check(workdir, write=True, flag="--workdir")
    results.write_grid(whole)
    results.clear(runs)
    cli.use_compilation_cache(workdir)
    limit = args.stop_after_s or float("inf")
    train_all(base, runs, results, limit, args.weights)
    conclude(runs, results)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration with get_variants().")
    flags.DEFINE_string("workdir", None, "Where the runs' files go.", required=True)
    flags.DEFINE_string("only", "", "Patterns of variants, as in duc*,fcn; default: all.")
    flags.DEFINE_list("seeds", [], "As in 0,1,2; default: as many as each variant says.")
    flags.DEFINE_bool("list", False, "Print the runs and what is done, and end.")
    flags.DEFINE_bool("weights", False, "Also keep each run's final network, weights/NAME.npz.")
    flags.DEFINE_float("stop_after_s", 0.0, "Start no run that would end later; 0 = no limit.")
    flags.DEFINE_bool("report", False, "Write a page about the runs of --workdir, and end.")
    flags.DEFINE_string("output", "ablation.md", "The page; its plots go into a folder beside it.")
    cli.run(main)
