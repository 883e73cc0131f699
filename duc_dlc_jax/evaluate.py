"""Whole-image evaluation at the label's size, and `python -m duc_dlc_jax.evaluate`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from duc_dlc_jax import cli, metrics, pictures, sharding, workdirs
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import IGNORE, LabelSpec
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.models.segmenter import Segmenter

HEADLINE = ("PA", "mPA", "mIoU", "final_score")
PROTOCOL = "single scale, whole image at its own size, logits resized to the label"


class Evaluator:
    """Confusion matrix and scores of a network over a split.

    Each process evaluates its own images on its own devices, in batches of one size (a compilation
    per size; the last batch is filled up with ignored pixels), and the integer matrices are summed
    over the processes at the end: the figures do not depend on the number of devices or hosts.
    """

    def __init__(self, model: Segmenter, spec: LabelSpec, batch_per_device: int = 1):
        self._mesh = sharding.data_mesh(jax.local_devices())
        self._batch = batch_per_device * len(jax.local_devices())
        self._spec = spec
        everywhere, split = sharding.replicated(self._mesh), sharding.batched(self._mesh)

        def step(variables, images, labels):
            logits: Any = model.apply(variables, images)
            predictions = logits.argmax(-1)
            matrix = metrics.confusion_matrix(labels, predictions, len(spec.classes))
            return matrix, predictions.astype(jnp.uint8)

        self._step = jax.jit(
            step, in_shardings=(everywhere, split, split), out_shardings=(everywhere, split)
        )
        self._split = split

    def run(
        self, variables: dict[str, Any], examples: Iterable[dict[str, Any]], keep: int = 0
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """variables: replicated over the global mesh. examples: this process's share.

        Returns the scores of `metrics.scores` with `matrix` (int64 [K, K], all processes) and
        `images`, and the first `keep` examples of this process with their `prediction`.
        """
        variables = sharding.local_copy(variables, self._mesh)
        classes = len(self._spec.classes)
        total, count, kept = np.zeros((classes, classes), np.int64), 0, []
        for batch in _batches_of_one_size(examples, self._batch):
            matrix, predictions = self._predict(variables, batch)
            total += np.asarray(matrix, np.int64)
            count += len(batch)
            for example, prediction in zip(batch, predictions, strict=False):
                if len(kept) < keep:
                    kept.append({**example, "prediction": prediction})
        total, count = _sum_over_processes(total), int(_sum_over_processes(np.array([count]))[0])
        return {**metrics.scores(total), "matrix": total, "images": count}, kept

    def _predict(self, variables, batch):
        fill = self._batch - len(batch)
        images = np.stack([e["image"] for e in batch] + [batch[0]["image"]] * fill)
        ignored = np.full_like(batch[0]["label"], IGNORE)
        labels = np.stack([e["label"] for e in batch] + [ignored] * fill)
        images, labels = (jax.device_put(x, self._split) for x in (images, labels))
        matrix, predictions = self._step(variables, images, labels)
        return matrix, np.asarray(predictions)


def _batches_of_one_size(examples, batch_size):
    waiting = defaultdict(list)
    for example in examples:
        group = waiting[example["image"].shape]
        group.append(example)
        if len(group) == batch_size:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
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

    figures = {name: number(scores[name]) for name in HEADLINE}
    per_class = {c: number(v) for c, v in zip(spec.classes, scores["iou"], strict=True)}
    return {
        "protocol": PROTOCOL,
        "images": scores["images"],
        "classes": len(spec.classes),
        **figures,
        "iou": per_class,
        "accuracy": {c: number(v) for c, v in zip(spec.classes, scores["accuracy"], strict=True)},
        "confusion_matrix": scores["matrix"].tolist(),
    }


def table(scores: dict[str, Any], spec: LabelSpec) -> str:
    """Per-class IoU and accuracy and the headline figures, as aligned text."""
    rows = [f"{'class':<24}{'IoU':>8}{'accuracy':>10}"]
    for name, iou, accuracy in zip(spec.classes, scores["iou"], scores["accuracy"], strict=True):
        rows.append(f"{name:<24}{iou:>8.4f}{accuracy:>10.4f}")
    rows.append(
        f"PA {scores['PA']:.4f}  mPA {scores['mPA']:.4f}  mIoU {scores['mIoU']:.4f}  "
        f"Final Score {scores['final_score']:.4f}  ({scores['images']} images; {PROTOCOL})"
    )
    return "\n".join(rows)


def scalars(scores: dict[str, Any], spec: LabelSpec) -> dict[str, float]:
    """Scores under the names that the metric writers use."""
    named = {f"val/{name}": scores[name] for name in HEADLINE}
    per_class = zip(spec.classes, scores["iou"], strict=True)
    return named | {f"val_iou/{name}": float(iou) for name, iou in per_class}


def main(_) -> None:
    args = flags.FLAGS
    cli.use_compilation_cache(Path(args.workdir))
    run = workdirs.load(args.workdir, args.checkpoint)
    data = run.config.data
    if args.data_dir:
        data.dir = args.data_dir
    records = open_records(data, args.split or data.eval_split)
    examples = pipeline.eval_examples(records, jax.process_index(), jax.process_count())
    evaluator = Evaluator(run.model, run.spec, run.config.eval.batch_size)
    scores, kept = evaluator.run(run.variables, examples, keep=args.pictures)
    print(f"checkpoint of step {run.step} in {args.workdir}")
    print(table(scores, run.spec))
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
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.DEFINE_integer("pictures", 0, "Write this many images, labels and predictions.")
    cli.run(main)
