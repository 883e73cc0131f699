"""ResNet-50 as bundles, through every runtime; the rows "out" of docs/conversion.md.

pytest -s -m export tests/test_export_deep.py prints them.
"""

from __future__ import annotations

import os
import pathlib

import pytest

from duc_dlc_jax import workdirs
from duc_dlc_jax.export import __main__ as command
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import gate, manifest, runtimes
from duc_dlc_jax.models import pretrained
from runs import untrained_workdir

pytestmark = pytest.mark.export
pytest.importorskip("onnxruntime", reason="the export extra is not installed")
SHARED = pathlib.Path(os.environ.get("DUC_DLC_SHARED_DATA", ""))
WEIGHTS, PHOTOS = SHARED / "resnet50_imagenet.npz", SHARED / "photos"
NETWORKS = {
    "ResNet-50, 1/32, corners": {},
    "ResNet-50, 1/8, stride": {"output_stride": 8, "resize_grid": "stride"},
}


@pytest.fixture(scope="module", params=NETWORKS)
def run(request, tmp_path_factory):
    """With ImageNet weights where they are at hand, and a drawn head."""
    fields = NETWORKS[request.param] | {"stride_on": "1x1"}

    def load(variables, config):
        if not WEIGHTS.is_file():
            return variables
        params, stats, _ = pretrained.load_backbone(
            WEIGHTS, "keras_v1", **variables, model_config=config.model
        )
        return {"params": params, "batch_stats": stats}

    folder = tmp_path_factory.mktemp("deep")
    return request.param, workdirs.load(untrained_workdir(folder, fields, "camvid", load))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_matrix(run, dtype, tmp_path):
    """The gate's figures, on photos and drawn scenes of three sizes; OpenVINO's on the scenes."""
    name, network = run
    if dtype != "float32" and "1/8" in name:
        pytest.skip("narrow dtypes are tried on one network")
    # XLA runs float16 on CPUs very slowly, ONNX Runtime no bfloat16.
    formats = {"float16": ("onnx",), "bfloat16": ("stablehlo",)}.get(dtype, ("stablehlo", "onnx"))
    options = manifest.Options(formats, output_kind="logits", dtype=dtype)
    images = str(PHOTOS) if PHOTOS.is_dir() else ""
    content = command.export(network, tmp_path / "bundle", options, images)
    figures = {form: content["gate"][form] for form in formats}
    if dtype == "float32":
        figures["openvino"] = through_openvino(tmp_path / "bundle")
    for form, listed in figures.items():
        worst = max(one["max_difference"] for one in listed)
        agreement = min(one["agreement"] for one in listed)
        print(f"\n| {name}, {dtype} | out: {form} | {worst:.1e} | {100 * agreement:.2f} % |")
        assert all(gate.passes(one, gate.TOLERANCE[dtype]) for one in listed)


def through_openvino(path):
    pytest.importorskip("openvino")
    infer = runtimes.load(bundles.read(path), "openvino")
    images, expected = gate.read_check(path)
    return [one.compare(infer(image)) for image, one in zip(images, expected, strict=True)]
