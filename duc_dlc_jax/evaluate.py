"""Scores of a network over a split by a protocol, and `python -m duc_dlc_jax.evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from duc_dlc_jax import (
    boundaries,
    cli,
    distributed,
    metrics,
    pictures,
    progress,
    protocols,
    report,
    storage,
    workdirs,
)
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.data.records import Records, open_records
from duc_dlc_jax.export.bundle import is_bundle
from duc_dlc_jax.export.runtimes import FORMS, BundleModel
from duc_dlc_jax.labelling import make_predictor
from duc_dlc_jax.models.segmenter import Segmenter

HEADLINE = ("PA", "mPA", "mIoU", "fwIoU", "final_score")


class Evaluator:
    """Confusion matrix and scores of a network over a split.

    Each process evaluates its own images on its own devices, and the integer counts are summed over
    the processes at the end: the figures do not depend on the number of devices or hosts.
    """

    def __init__(
        self,
        model: Segmenter | BundleModel,
        spec: LabelSpec,
        batch_per_device: int = 1,
        protocol: protocols.Protocol | None = None,
        boundary: bool = False,
        boundary_width: float = boundaries.IOU_WIDTH,
    ):
        """boundary_width: of boundary IoU, a share of an image's diagonal."""
        self.predictor = make_predictor(model, protocol, batch_per_device)
        self._spec, self._boundary, self._width = spec, boundary, boundary_width
        self.protocol, self.programs = self.predictor.protocol, self.predictor.programs

    def run(
        self,
        variables: dict[str, Any],
        examples: Iterable[dict[str, Any]],
        keep: int = 0,
        absent: str = "skip",
        each: Callable[[dict[str, Any]], None] | None = None,
        boundary: bool | None = None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """variables: replicated over the global mesh. examples: this process's share. boundary: in
        place of the one that the evaluator was made with.

        Returns the scores of `metrics.scores` with `matrix` (int64 [K, K], all processes),
        `images`, `protocol` (a sentence) and, if asked for, `boundary`, and the first `keep`
        examples of this process with their `prediction`. each: called with every such example.
        """
        classes, boundary = (
            len(self._spec.classes),
            self._boundary if boundary is None else boundary,
        )
        total, count, kept = np.zeros((classes, classes), np.int64), 0, []
        edges = np.zeros((classes, boundaries.COUNTS), np.int64)
        for batch, matrix in self.predictor.batches(variables, examples):
            total += np.asarray(matrix, np.int64)
            count += len(batch)
            for example in batch:
                if boundary:
                    masks = example["label"], example["prediction"]
                    edges += boundaries.counts(*masks, classes, self._width)
                if each:
                    each(example)
                if len(kept) < keep:
                    kept.append(example)
        distributed.meet("the sums of an evaluation")
        total, edges, images = (sum_over_processes(x) for x in (total, edges, np.array([count])))
        scores = metrics.scores(total, absent)
        scores |= {"matrix": total, "images": int(images[0])}
        scores["protocol"] = self.protocol.sentence() + metrics.ABSENT[absent]
        if boundary:
            scores["boundary"] = boundaries.scores(edges, self._width, absent)
        return scores, kept

    def predictions(
        self, variables: dict[str, Any], examples: Iterable[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The examples with their `prediction`, train ids uint8 [H, W]; in another order."""
        for batch, _ in self.predictor.batches(variables, examples):
            yield from batch


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Exact int64 sum over processes, gathered as pairs of int32: JAX moves no int64 by default."""
    if jax.process_count() == 1:
        return counts
    parts = np.stack([counts >> 31, counts & 0x7FFFFFFF]).astype(np.int32)
    high, low = np.asarray(multihost_utils.process_allgather(parts), np.int64).sum(0)
    return (high << 31) + low


def summary(scores: dict[str, Any], spec: LabelSpec) -> dict[str, Any]:
    """Scores as JSON-ready numbers (NaN as None), with the protocol they were taken by."""

    def number(x: float) -> float | None:
        return None if np.isnan(x) else round(float(x), 6)

    def per_class(values) -> dict[str, float | None]:
        return {c: number(v) for c, v in zip(spec.classes, values, strict=True)}

    figures = {name: scores[name] for name in HEADLINE} | metrics.extra_mious(scores, spec.name)
    result = {
        "protocol": scores["protocol"],
        "images": scores["images"],
        "classes": len(spec.classes),
        **{name: number(value) for name, value in figures.items()},
        "iou": per_class(scores["iou"]),
        "accuracy": per_class(scores["accuracy"]),
        "pixels": dict(zip(spec.classes, scores["pixels"].tolist(), strict=True)),
        "confusion_matrix": scores["matrix"].tolist(),
    }
    if "boundary" in scores:
        edges = scores["boundary"]
        result["boundary"] = {
            "widths": edges["widths"],
            **{name: number(edges[name]) for name in ("mean_iou", "mean_f")},
            **{name: per_class(edges[name]) for name in ("iou", "f")},
        }
    return result


def table(scores: dict[str, Any], spec: LabelSpec) -> str:
    """Per-class figures and the headline ones, as aligned text."""
    edges = scores.get("boundary")
    columns = {"IoU": scores["iou"], "accuracy": scores["accuracy"]}
    if edges:
        columns |= {"boundary IoU": edges["iou"], "boundary F": edges["f"]}
    rows = [f"{'class':<24}" + "".join(f"{name:>14}" for name in columns) + f"{'pixels':>14}"]
    for i, name in enumerate(spec.classes):
        figures = "".join(f"{values[i]:>14.4f}" for values in columns.values())
        rows.append(f"{name:<24}{figures}{scores['pixels'][i]:>14,}")
    named = {"final_score": "Final Score"}
    figures = {named.get(name, name): scores[name] for name in HEADLINE}
    figures |= metrics.extra_mious(scores, spec.name)
    if edges:
        figures |= {"boundary mIoU": edges["mean_iou"], "boundary mF": edges["mean_f"]}
        rows.append(edges["widths"])
    text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    rows.append(f"{text}  ({scores['images']} images; {scores['protocol']})")
    return "\n".join(rows)


def scalars(scores: dict[str, Any], spec: LabelSpec) -> dict[str, float]:
    """Scores under the names that the metric writers use."""
    named = {f"val/{name}": scores[name] for name in HEADLINE}
    named |= {
        f"val/{name}": value for name, value in metrics.extra_mious(scores, spec.name).items()
    }
    per_class = zip(spec.classes, scores["iou"], strict=True)
    return named | {f"val_iou/{name}": float(iou) for name, iou in per_class}


def open_run(args: Any, path: str, form: str = "") -> tuple[workdirs.Run, Records]:
    """The run or bundle at `path`, and the split that the flags name: checkpoint, data_dir, split.

    form: of a bundle, see `workdirs.load_any`.
    """
    if not is_bundle(path):  # which stays as it is
        cli.use_compilation_cache(storage.path(path))
    run = workdirs.load_any(path, args.checkpoint, form)
    data = run.config.data
    if args.data_dir:
        data.dir = args.data_dir
    records = open_records(data, args.split or data.eval_split)
    if records.spec.classes != run.spec.classes:
        raise ConfigError(
            f"{records.folder} was prepared with {records.spec.num_classes} classes "
            f"({', '.join(records.spec.classes[:3])}, ...), {path} labels "
            f"{run.spec.num_classes} ({', '.join(run.spec.classes[:3])}, ...): give another "
            "--data_dir, or rebuild the network with python -m duc_dlc_jax.surgery classes"
        )
    return run, records


def comparison_table(results: dict[str, dict[str, Any]]) -> str:
    """The headline figures of several protocols, a line each, as aligned text."""
    columns = {name: name for name in HEADLINE} | {"final_score": "Final Score"}
    rows = {name: [s[column] for column in HEADLINE] for name, s in results.items()}
    titles = list(columns.values())
    if all("boundary" in s for s in results.values()):
        titles += ["boundary mIoU", "boundary mF"]
        for name, s in results.items():
            rows[name] += [s["boundary"]["mean_iou"], s["boundary"]["mean_f"]]
    lines = [f"{'protocol':<24}" + "".join(f"{title:>14}" for title in titles)]
    lines += [f"{n:<24}" + "".join(f"{x:>14.4f}" for x in row) for n, row in rows.items()]
    return "\n".join(lines)


def main(_) -> None:
    args = flags.FLAGS
    path = args.workdir or args.model
    if bool(args.workdir) == bool(args.model):
        raise ConfigError("either --workdir=DIR, or --model=BUNDLE or workdir")
    if args.pictures and is_bundle(path):
        raise ConfigError(f"--pictures writes into a workdir; {path} is a bundle")
    if args.pictures:
        storage.check(storage.path(path), write=True, flag="--workdir")
    for name in ("json", "report"):
        if target := getattr(args, name):
            storage.check(storage.path(target), write=True, flag=f"--{name}", file=name == "json")
    if args.boundary_width != boundaries.IOU_WIDTH and not args.boundary:
        raise ConfigError(f"--boundary_width={args.boundary_width:g} needs --boundary")
    run, records = open_run(args, path, args.format)
    evaluators, settings = {}, {}
    for name in args.protocol or ["config.eval"]:
        config = protocols.select(run.config, name if args.protocol else "", args.set)
        chosen = protocols.Protocol.from_config(config).planned(records.sizes())
        batch, settings[name] = config.eval.batch_size, config.eval.to_dict()
        edges = args.boundary, args.boundary_width
        evaluators[name] = Evaluator(run.model, run.spec, batch, chosen, *edges)
    print(f"checkpoint of step {run.step} in {path}")
    results, images = {}, report.ImageScores(len(records), run.spec.num_classes)
    for name, evaluator in evaluators.items():
        first = not results
        results[name], kept = evaluator.run(
            run.variables,
            _shown_examples(records),
            args.pictures if first else 0,
            args.absent,
            images.add if first and args.report else None,
        )
        if len(evaluators) > 1:
            print(f"\n{name}")
        print(table(results[name], run.spec))
        programs = evaluator.programs()
        print("compiled: {network} programs with the network, {other} small".format(**programs))
        if kept:
            folder = storage.path(path) / "pictures" / f"evaluate-{run.step}"
            pictures.write_triples(folder, kept, run.spec)
            logging.info("pictures in %s", folder)
    if len(evaluators) > 1:
        print(f"\n{comparison_table(results)}")
    if args.json and jax.process_index() == 0:
        write_json(args, run, records, results, settings)
    if args.report:
        write_report(args, run, records, next(iter(evaluators.values())), results, images)


def _shown_examples(records: Records) -> Iterator[dict[str, Any]]:
    """This process's examples, with their number as `record`; shows how many are done."""
    first, step = jax.process_index(), jax.process_count()
    examples = pipeline.eval_examples(records, first, step)
    numbers = range(first, len(records), step)
    examples = progress.shown(examples, len(numbers), "image", quiet=first > 0)
    for number, example in zip(numbers, examples, strict=True):
        yield example | {"record": number}


def write_report(args, run, records, evaluator, results, images: report.ImageScores) -> None:
    """The page of `--report`; process 0 labels its images once more."""
    mious = sum_over_processes(images.values) / report.UNIT - 1
    mious[mious < 0] = np.nan
    if jax.process_index() > 0:
        return
    chosen = report.choose(mious, args.report_images)
    groups = {record: group for group, members in chosen.items() for record in members}
    examples = (records[record] | {"record": record} for record in groups)
    labelled = {e["record"]: e for e in evaluator.predictions(run.variables, examples)}
    split, classes = args.split or run.config.data.eval_split, run.spec.num_classes
    shown = [report.picture(labelled[r], group, classes) for r, group in groups.items()]
    data = report.page_data(
        f"{run.spec.name}, {split}",
        f"Evaluation of step {run.step} in {run.workdir.name}, {len(records):,} images",
        run.spec,
        results,
        report.curves(run.workdir / "metrics.jsonl"),
        mious,
        shown,
    )
    print(f"report: {report.write(storage.path(args.report), data)}")


def write_json(
    args, run: workdirs.Run, records: Records, results: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The summary of one protocol; of several, each under its name in `protocols`.

    settings: of each protocol the fields of config.eval; they are `eval` of its summary, and not in
    the run's `config`. `checkpoint` is the rule by which the step was chosen: best, latest, a
    number, or bundle for the one that a bundle has.
    """
    summaries = {
        name: summary(scores, run.spec) | {"eval": settings[name]}
        for name, scores in results.items()
    }
    figures = {"protocols": summaries} if len(results) > 1 else next(iter(summaries.values()))
    chosen = "bundle" if isinstance(run.model, BundleModel) else args.checkpoint
    written = {"step": run.step, "checkpoint": chosen, "split": records.split, **figures}
    written |= {"config": {k: v for k, v in run.config.to_dict().items() if k != "eval"}}
    storage.write_text(storage.path(args.json), json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "What training wrote; may be s3:// or gs://.")
    flags.DEFINE_string("model", "", "A bundle, or as --workdir.")
    flags.DEFINE_enum("format", "", ["", *FORMS], "Of a bundle; default: its first.")
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    flags.DEFINE_string("split", "", "Default: the configuration's data.eval_split.")
    flags.DEFINE_string("data_dir", "", "Default: the configuration's data.dir.")
    cli.define_protocol(several=True)
    flags.DEFINE_enum("absent", "skip", list(metrics.ABSENT), "Classes that occur nowhere.")
    flags.DEFINE_bool("boundary", False, "Also boundary IoU and boundary F-score.")
    width = "Of boundary IoU: a share of the image's diagonal."
    flags.DEFINE_float("boundary_width", boundaries.IOU_WIDTH, width, 0.0, 1.0)
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.DEFINE_integer("pictures", 0, "Write this many images, labels and predictions.")
    flags.DEFINE_string("report", "", "Also write a page with figures and images to this folder.")
    flags.DEFINE_integer("report_images", 3, "Of the best, median and worst each.", lower_bound=0)
    cli.run(main)
