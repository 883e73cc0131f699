"""Scores of a network over a split by a protocol, and `python -m duc_dlc_jax.evaluate`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from duc_dlc_jax import boundaries, cli, metrics, pictures, protocols, sharding, workdirs
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import IGNORE, LabelSpec
from duc_dlc_jax.data.records import Records, open_records
from duc_dlc_jax.inference import Labeller
from duc_dlc_jax.models.segmenter import Segmenter

HEADLINE = ("PA", "mPA", "mIoU", "fwIoU", "final_score")


class Evaluator:
    """Confusion matrix and scores of a network over a split.

    Each process evaluates its own images on its own devices, in batches of one padded size (the
    last batch is filled up with ignored pixels), and the integer counts are summed over the
    processes at the end: the figures do not depend on the number of devices or hosts.
    """

    def __init__(
        self,
        model: Segmenter,
        spec: LabelSpec,
        batch_per_device: int = 1,
        protocol: protocols.Protocol | None = None,
        boundary: bool = False,
    ):
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        self._batch = batch_per_device * len(jax.local_devices())
        self._spec = spec
        self.protocol = protocol or protocols.Protocol(grid=model.resize_grid)
        self._labeller = Labeller(model, self.protocol, self._mesh)
        self._boundary = boundary

    def run(
        self,
        variables: dict[str, Any],
        examples: Iterable[dict[str, Any]],
        keep: int = 0,
        absent: str = "skip",
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """variables: replicated over the global mesh. examples: this process's share.

        Returns the scores of `metrics.scores` with `matrix` (int64 [K, K], all processes),
        `images`, `protocol` (a sentence) and, if asked for, `boundary`, and the first `keep`
        examples of this process with their `prediction`.
        """
        classes = len(self._spec.classes)
        total, count, kept = np.zeros((classes, classes), np.int64), 0, []
        edges = np.zeros((classes, boundaries.COUNTS), np.int64)
        for batch, matrix in self._labelled(variables, examples):
            total += np.asarray(matrix, np.int64)
            count += len(batch)
            for example in batch:
                if self._boundary:
                    edges += boundaries.counts(example["label"], example["prediction"], classes)
                if len(kept) < keep:
                    kept.append(example)
        total, edges, images = (sum_over_processes(x) for x in (total, edges, np.array([count])))
        scores = metrics.scores(total, absent)
        scores |= {"matrix": total, "images": int(images[0])}
        scores["protocol"] = self.protocol.sentence() + metrics.ABSENT[absent]
        if self._boundary:
            scores["boundary"] = boundaries.scores(edges)
        return scores, kept

    def predictions(
        self, variables: dict[str, Any], examples: Iterable[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The examples with their `prediction`, train ids uint8 [H, W]; in another order."""
        for batch, _ in self._labelled(variables, examples):
            yield from batch

    def programs(self) -> dict[str, int]:
        """Programs compiled so far; see `Labeller.programs`."""
        return self._labeller.programs()

    def _labelled(self, variables, examples):
        """(batch with predictions, confusion matrix) of each batch."""
        variables = sharding.local_copy(variables, self._mesh)
        for batch in _batches_of_one_size(examples, self._batch, self.protocol.padded_size):
            matrix, ids = self._predict(variables, batch)
            for example, prediction in zip(batch, ids, strict=False):
                height, width = example["label"].shape
                example["prediction"] = prediction[:height, :width]
            yield batch, matrix

    def _predict(self, variables, batch):
        padded = self.protocol.padded_size(batch[0]["label"].shape)
        images = np.zeros((self._batch, *padded, 3), np.uint8)
        labels = np.full((self._batch, *padded), IGNORE, np.uint8)
        sizes = [e["label"].shape for e in batch]
        for i, (example, (height, width)) in enumerate(zip(batch, sizes, strict=True)):
            images[i, :height, :width] = example["image"]
            labels[i, :height, :width] = example["label"]
        sizes += sizes[:1] * (self._batch - len(batch))
        matrix, ids = self._labeller(variables, images, labels, sizes)
        return matrix, np.asarray(ids)


def _batches_of_one_size(examples, batch_size, padded_size):
    waiting = defaultdict(list)
    for example in examples:
        group = waiting[padded_size(example["label"].shape)]
        group.append(dict(example))
        if len(group) == batch_size:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


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

    figures = {name: scores[name] for name in HEADLINE} | metrics.named(scores, spec.name)
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
    figures |= metrics.named(scores, spec.name)
    if edges:
        figures |= {"boundary mIoU": edges["mean_iou"], "boundary mF": edges["mean_f"]}
        rows.append(edges["widths"])
    text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    rows.append(f"{text}  ({scores['images']} images; {scores['protocol']})")
    return "\n".join(rows)


def scalars(scores: dict[str, Any], spec: LabelSpec) -> dict[str, float]:
    """Scores under the names that the metric writers use."""
    named = {f"val/{name}": scores[name] for name in HEADLINE}
    named |= {f"val/{name}": value for name, value in metrics.named(scores, spec.name).items()}
    per_class = zip(spec.classes, scores["iou"], strict=True)
    return named | {f"val_iou/{name}": float(iou) for name, iou in per_class}


def open_run(args: Any) -> tuple[workdirs.Run, Records]:
    """The run and the split that the flags name: workdir, checkpoint, protocol, data_dir, split."""
    cli.use_compilation_cache(Path(args.workdir))
    run = workdirs.load(args.workdir, args.checkpoint)
    protocols.select(run.config, args.protocol, args.set)
    data = run.config.data
    if args.data_dir:
        data.dir = args.data_dir
    return run, open_records(data, args.split or data.eval_split)


def main(_) -> None:
    args = flags.FLAGS
    run, records = open_run(args)
    examples = pipeline.eval_examples(records, jax.process_index(), jax.process_count())
    protocol = protocols.Protocol.from_config(run.config)
    batch = run.config.eval.batch_size
    evaluator = Evaluator(run.model, run.spec, batch, protocol, args.boundary)
    scores, kept = evaluator.run(run.variables, examples, args.pictures, args.absent)
    print(f"checkpoint of step {run.step} in {args.workdir}")
    print(table(scores, run.spec))
    print("compiled: {network} programs with the network, {other} small".format(
        **evaluator.programs()
    ))  # fmt: skip
    if args.json:
        text = json.dumps({"step": run.step, **summary(scores, run.spec)}, indent=1)
        Path(args.json).write_text(text + "\n")
    if kept:
        folder = Path(args.workdir) / "pictures" / f"evaluate-{run.step}"
        pictures.write_triples(folder, kept, run.spec)
        logging.info("pictures in %s", folder)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "What training wrote.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    flags.DEFINE_string("split", "", "Default: the configuration's data.eval_split.")
    flags.DEFINE_string("data_dir", "", "Default: the configuration's data.dir.")
    protocols.define_flags()
    flags.DEFINE_enum("absent", "skip", list(metrics.ABSENT), "Classes that occur nowhere.")
    flags.DEFINE_bool("boundary", False, "Also boundary IoU and boundary F-score.")
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.DEFINE_integer("pictures", 0, "Write this many images, labels and predictions.")
    cli.run(main)
