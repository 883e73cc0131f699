"""`bundle.json`: what its reader must know to use the model and to trust its figures."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import duc_dlc_jax
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import protocols, provenance, storage, workdirs
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import stablehlo
from duc_dlc_jax.models import layers, pretrained, weights

INPUTS = {
    "uint8": "RGB, 0..255",
    "float32": "RGB / 255, minus the mean, over the standard deviation, per channel",
}
OUTPUTS = {
    "ids": "the class of each pixel, an index of labels.classes",
    "logits": "a score per class, before the softmax",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the command; size: (height, width) in pixels, None = any."""

    formats: tuple[str, ...] = ("stablehlo", "onnx")
    input: str = "uint8"
    output_kind: str = "ids"
    dtype: str = "float32"
    size: tuple[int, int] | None = None

    @property
    def numpy_dtype(self) -> Any:
        return jnp.dtype(self.dtype)

    def check(self) -> None:
        """Raises ConfigError for what cannot be exported."""
        if "onnx" not in self.formats:
            return
        if self.dtype == "bfloat16":
            raise ConfigError(
                "--dtype=bfloat16 with --format=onnx: ONNX Runtime has no bfloat16 convolution on "
                "CPUs, so its answers could not be checked. Use float16, or --format=stablehlo"
            )
        missing = [name for name in ("onnx", "onnxruntime") if not provenance.version(name)]
        if missing:
            raise ConfigError(
                f"--format=onnx needs {' and '.join(missing)}: pip install 'duc-dlc-jax[export]'; "
                "or --format=stablehlo"
            )


def describe(run: workdirs.Run, options: Options) -> dict[str, Any]:
    """The manifest without the gate's figures, JSON-ready."""
    height, width = options.size or ("any", "any")
    output_dtype = {"ids": "uint8", "logits": "float32"}[options.output_kind]
    axes = ["batch", "height", "width"] + ["class"] * (options.output_kind == "logits")
    return {
        "bundle_version": bundles.VERSION,
        "formats": {form: bundles.FILES[form] for form in options.formats},
        "input": {
            "name": "image",
            "dtype": options.input,
            "axes": ["batch", "height", "width", "channel"],
            "height": height,
            "width": width,
            "min_side": stablehlo.MIN_SIDE,
            "means": INPUTS[options.input],
            **(
                {"mean": layers.IMAGE_MEAN, "std": layers.IMAGE_STD}
                if options.input == "float32"
                else {}
            ),
        },
        "output": {
            "name": options.output_kind,
            "dtype": output_dtype,
            "axes": axes,
            "means": OUTPUTS[options.output_kind],
        },
        "dtype": options.dtype,
        "labels": json.loads(run.spec.to_json()),
        "evaluation": _evaluation(run),
        "training": {
            "step": run.step,
            "config": {
                "data": {"name": run.config.data.name, "eval_split": run.config.data.eval_split},
                "model": run.config.model.to_dict(),
            },
        },
        "weights": _weights(run.config),
        "versions": {
            name: version
            for name in ("jax", "jaxlib", "flax", "numpy", "onnx", "onnxruntime")
            if (version := provenance.version(name))
        }
        | {"duc-dlc-jax": duc_dlc_jax.__version__, "python": platform.python_version()},
        "gate": {"reference": "the network as trained, float32, products in highest precision"},
    }


def _evaluation(run: workdirs.Run) -> dict[str, Any] | None:
    """The scores that training took of this checkpoint, None if it took none."""
    lines = storage.json_lines(storage.read(run.workdir / "metrics.jsonl"))
    for values in reversed(lines):
        if values["step"] == run.step and "val/mIoU" in values:
            figures = {k: v for k, v in values.items() if k.startswith(("val/", "val_iou/"))}
            figures.pop("val/images_per_second", None)
            return {
                "split": f"{run.config.data.name} {run.config.data.eval_split}",
                "protocol": protocols.Protocol.from_config(run.config).sentence(),
                **figures,
            }
    return None


def _weights(config: Any, passed: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Where the first weights came from, also through the run that this one started from.

    passed: workdirs on the way here; a run that leads back to one of them ends it.
    """
    if config.init.checkpoint:
        try:
            start = storage.absolute(storage.path(config.init.checkpoint).expanduser())
            text = storage.read(start / "config.json")
        except storage.errors():
            text = ""
        name = Path(config.init.checkpoint).name
        if text and str(start) not in passed:
            first = config_lib.from_json(text)
            return {**_weights(first, passed | {str(start)}), "through": name}
        why = "starts from itself" if text else "cannot be read"
        return {"file": None, "origin": f"the run {name}, which {why}", "licence": "unknown"}
    if not config.init.weights:
        return {"file": None, "origin": "trained from scratch", "licence": "the trainer's"}
    known = weights.TABLE.get(config.init.weights)
    if known:
        origin, licence = f"{known.owner}, trained on {known.data}", known.licence
        return {"file": known.file, "url": known.url, "origin": origin, "licence": licence}
    name, source = Path(config.init.weights).name, pretrained.SOURCES.get(config.init.source)
    return {
        "file": name,
        "origin": source.note if source else f"the file {name}, of unknown origin",
        "licence": f"{source.licence} if the file is theirs: not verified" if source else "unknown",
    }
