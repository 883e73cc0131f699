"""The programs of `examples/`, as a user runs them: with a bundle and without the package."""

from __future__ import annotations

import ast
import dataclasses
import http.client
import importlib.util
import io
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import workdirs
from duc_dlc_jax.data.builders import scenes
from duc_dlc_jax.export import __main__ as command
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import folding, manifest, runtimes
from duc_dlc_jax.models import layers
from networks import NARROW
from repository import parsed
from runs import environment, untrained_workdir

pytest.importorskip("onnxruntime", reason="the export extra is not installed")
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
PYTHON = {"predict_jax": "jax", "predict_onnxruntime": "onnxruntime", "web_server": "onnxruntime"}
IMAGE = scenes.draw("val", 1)[0][:93, :131]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bundles of one network whose gate did not run: `test_export.py` has those."""
    folder = tmp_path_factory.mktemp("examples")
    run = workdirs.load(untrained_workdir(folder / "run", NARROW))
    network = folding.FoldedNetwork(run.model, run.variables)
    floats = manifest.Options(input="float32", output_kind="logits")
    for name, options in {"bundle": manifest.Options(), "floats": floats}.items():
        command._write_models(folder / name, run, network, options)
    return folder


@pytest.fixture(scope="module")
def bundle(folder):
    """Takes uint8 images, gives ids."""
    return folder / "bundle"


@pytest.fixture(scope="module")
def floats(folder):
    """Takes normalised images, gives logits."""
    return folder / "floats"


@pytest.fixture(scope="module")
def expected(bundle):
    """Train ids of IMAGE by the package."""
    return runtimes.load(bundles.read(bundle), "onnx")(IMAGE[None])[0]


@pytest.fixture
def files(tmp_path):
    """A photo and what is none, in the formats that the examples read."""
    for suffix in ("png", "ppm"):
        Image.fromarray(IMAGE).save(tmp_path / f"photo.{suffix}")
        content = (tmp_path / f"photo.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"text.{suffix}").write_text("no image")
        Image.new("RGB", (31, 64)).save(tmp_path / f"small.{suffix}")
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")  # 64 million pixels in 8 KB
    (tmp_path / "large.ppm").write_bytes(b"P6 8000 8000 255\n")
    (tmp_path / "deep.ppm").write_bytes(b"P6\n# 16 bits\n64 64 65535\n" + bytes(64 * 64 * 6))
    (tmp_path / "endless.ppm").write_bytes(b"P6 99999999999999999999 64 255\n")
    return tmp_path


BAD = {
    "text": "not a readable image|not a binary PPM",
    "truncated": "not a readable image|truncated",
    "small": "sides",
    "large": "8000x8000, more than 50,?000,?000 pixels",
    "missing": "No such file|no such file",
}


@pytest.mark.parametrize("name", PYTHON)
def test_imports_are_those_that_are_said(name):
    tree = parsed((EXAMPLES / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {PYTHON[name], "numpy", "PIL"}


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("name", ["predict_jax", "predict_onnxruntime"])
def test_python_examples(name, bundle, floats, expected, files):
    """In a folder of its own; then other bundles and images, without starting Python again."""
    arguments = [bundle, files / "photo.png", files / "mask.png"]
    subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        check=True,
        cwd=files,
        env=environment(PYTHONPATH=""),
    )
    with Image.open(files / "mask.png") as mask:
        assert (np.asarray(mask) == expected).mean() > 0.999
        assert mask.getpalette()[3:6] == list(bundles.read(bundle).spec.palette[1])
    program = module(name)
    wanted = bundles.read(floats).manifest["input"]
    normal = layers.normalize(jnp.asarray(IMAGE[None]), jnp.float32)
    np.testing.assert_allclose(program.model_input(IMAGE, wanted), normal, atol=1e-6)
    program.main(str(floats), str(files / "photo.png"), str(files / "floats.png"))
    with Image.open(files / "floats.png") as mask:
        assert (np.asarray(mask) == expected).mean() > 0.999
    with pytest.raises(SystemExit, match=r"mask\.jpg: a mask is a \.png"):
        program.main(str(bundle), str(files / "photo.png"), str(files / "mask.jpg"))
    for bad, message in BAD.items():
        target = files / f"{bad}-mask.png"
        with pytest.raises(SystemExit, match=message):
            program.main(str(bundle), str(files / f"{bad}.png"), str(target))
        assert not target.exists()


@pytest.fixture(scope="module")
def server(bundle):
    arguments = [sys.executable, EXAMPLES / "web_server.py", bundle, "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield process.stdout.readline().decode().strip()
    process.terminate()
    process.wait(10)
    process.stdout.close()


def post(url, data):
    """(status, body)"""
    try:
        with urllib.request.urlopen(url, data, timeout=600) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_web_server(server, bundle, expected, files):
    with urllib.request.urlopen(server, timeout=600) as page:
        assert b"<input type=file" in page.read()
    status, picture = post(server, (files / "photo.png").read_bytes())
    assert status == 200
    palette = np.array(bundles.read(bundle).spec.palette, np.uint8)
    drawn = np.asarray(Image.open(io.BytesIO(picture)))
    np.testing.assert_array_equal(drawn, IMAGE // 2 + palette[expected] // 2)
    for bad, message in {"text": b"not a readable", "small": b"31x64", "large": b"8000x"}.items():
        status, body = post(server, (files / f"{bad}.png").read_bytes())
        assert (status, message in body) == (400, True), body
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=600)
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", "20000001")
    connection.endheaders()  # no byte of it is sent, and none is waited for
    assert connection.getresponse().status == 413
    connection.close()
    assert post(server, (files / "photo.png").read_bytes())[0] == 200  # it goes on


def test_the_web_server_refuses_bundles_that_it_cannot_serve(bundle, tmp_path):
    read = bundles.read(bundle)
    changed = dataclasses.replace(read, path=tmp_path).manifest
    shutil.copy(bundle / "model.onnx", tmp_path)
    bundles.write(tmp_path, changed | {"input": changed["input"] | {"height": 48, "width": 64}})
    with pytest.raises(SystemExit, match="--size=dynamic --input=uint8 --output_kind=ids"):
        module("web_server").main(str(tmp_path))


@pytest.mark.parametrize("name", PYTHON)
def test_folders_that_hold_no_such_model(name, bundle, tmp_path):
    program = module(name)
    arguments = ["8000"] if name == "web_server" else ["photo.png", "mask.png"]
    with pytest.raises(SystemExit, match=r"bundle\.json is missing"):
        program.main(str(tmp_path), *arguments)
    shutil.copy(bundle / "bundle.json", tmp_path)
    with pytest.raises(SystemExit, match=r"model\.\w+ is missing; give a bundle that holds it"):
        program.main(str(tmp_path), *arguments)


@pytest.mark.export
def test_cpp_with_openvino(bundle, expected, files):
    openvino = importlib.util.find_spec("openvino")  # importing it would start its telemetry
    assert openvino, "make install EXTRAS=dev,export"
    build, cmake = files / "build", pathlib.Path(openvino.origin).parent / "cmake"
    where = f"-DOpenVINO_DIR={cmake}"
    source = EXAMPLES / "cpp_openvino"
    strict = "-DCMAKE_CXX_FLAGS=-Werror"
    subprocess.run(["cmake", "-S", source, "-B", build, where, strict], check=True)
    subprocess.run(["cmake", "--build", build], check=True)

    def segment(image, model="model.onnx"):
        arguments = [build / "segment", bundle / model, files / image, files / "mask.pgm"]
        return subprocess.run(arguments, capture_output=True, text=True)

    done = segment("photo.ppm")
    assert done.returncode == 0, done.stderr
    with Image.open(files / "mask.pgm") as mask:
        assert (np.asarray(mask) == expected).mean() > 0.999
    (files / "mask.pgm").unlink()
    deep = {"deep": "values up to 65535", "endless": "header is not that of a PPM"}
    for bad, message in (BAD | deep).items():
        done = segment(f"{bad}.ppm")
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr
    assert segment("photo.ppm", "bundle.json").returncode == 1
    assert not (files / "mask.pgm").exists()
