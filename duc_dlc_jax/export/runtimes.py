"""The model of a bundle in its own runtime: StableHLO by JAX, ONNX by ONNX Runtime or OpenVINO.

As a program, `python -m duc_dlc_jax.export.runtimes FORMAT INPUTS.npz OUTPUTS.npz BUNDLE...`, it
runs arrays through models in a process that knows nothing of the network; the gate starts it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.export.bundle import Bundle, read

FORMS = ("stablehlo", "onnx", "openvino")


def load(bundle: Bundle, form: str = "", threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Returns images uint8 RGB [B, H, W, 3] -> train ids uint8 [B, H, W] or logits float32.

    form: "stablehlo", "onnx", or "openvino", which runs the same file as "onnx"; "": the bundle's
    first. threads: of ONNX Runtime and OpenVINO; 0: as many as they like.

    Raises ConfigError for a format that the bundle lacks and for a runtime that is not installed,
    DataError for a file that its runtime cannot read.
    """
    form = form or bundle.formats[0]
    if form.replace("openvino", "onnx") not in bundle.formats:
        raise ConfigError(f"{bundle.path} holds {', '.join(bundle.formats)}, not {form!r}")
    start = (_stablehlo, _onnx, _openvino)[FORMS.index(form)]
    run = start(bundle, threads)
    wanted = bundle.manifest["input"]

    def infer(images: np.ndarray) -> np.ndarray:
        check_size(bundle, images.shape[1:3])
        if wanted["dtype"] == "float32":
            mean, std = (np.asarray(wanted[name], np.float32) for name in ("mean", "std"))
            scaled = images.astype(np.float32) / 255 - mean[None, None, None]
            images = scaled / std[None, None, None]
        return run(images)

    return infer


class BundleModel:
    """A bundle's model as the commands take it in a network's place."""

    def __init__(self, bundle: Bundle, form: str = ""):
        self.bundle, self.num_classes = bundle, bundle.spec.num_classes
        self._infer = load(bundle, form)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB [B, H, W, 3] -> train ids uint8 [B, H, W]."""
        output = self._infer(images)
        return output if output.ndim == 3 else output.argmax(-1).astype(np.uint8)


def check_size(bundle: Bundle, size: tuple[int, ...]) -> None:
    """Raises DataError for images of a (height, width) that the bundle does not take."""
    least = bundle.manifest["input"]["min_side"]
    if bundle.size and tuple(size) != tuple(bundle.size):
        wanted = "x".join(map(str, bundle.size))
        raise DataError(
            f"an image of {size[0]}x{size[1]}; {bundle.path} takes {wanted} alone (height x width)."
            " Resize it, or export with --size=dynamic"
        )
    if min(size) < least:
        raise DataError(
            f"an image of {size[0]}x{size[1]}; {bundle.path} takes sides from {least} pixels on"
        )


def _stablehlo(bundle: Bundle, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import jax
    from jax import export

    try:
        exported = export.deserialize(bytearray(bundle.file("stablehlo").read_bytes()))
    except Exception as error:  # flatbuffers and MLIR raise what they like
        raise DataError(f"{bundle.file('stablehlo')}: not readable: {error}") from error
    call = jax.jit(exported.call)
    return lambda images: np.asarray(call(images))


def _onnx(bundle: Bundle, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = _installed("onnxruntime", "'duc-dlc-jax[export]'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(bundle.file("onnx"))
    try:
        session = onnxruntime.InferenceSession(path, options, onnxruntime.get_available_providers())
    except Exception as error:
        raise DataError(f"{path}: not readable: {error}") from error
    return lambda images: np.asarray(session.run(None, {"image": images})[0])


def _openvino(bundle: Bundle, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    openvino = _installed("openvino", "openvino")
    path, core = str(bundle.file("onnx")), openvino.Core()
    # OpenVINO would compute in bfloat16 where the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        model = core.compile_model(path, "CPU", settings)
    except RuntimeError as error:
        raise DataError(f"{path}: not readable: {error}") from error
    return lambda images: np.array(model(images)[0])


def _installed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is not installed: pip install {package}") from error


def main(form: str, inputs: str, outputs: str, *paths: str) -> None:
    """Writes the output of input NAME and the n-th bundle as n/NAME."""
    results = {}
    with np.load(inputs, allow_pickle=False) as arrays:
        for number, path in enumerate(paths):
            run = load(read(path), form)
            results |= {f"{number}/{name}": run(arrays[name]) for name in arrays.files}
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
