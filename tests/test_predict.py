"""Files of all kinds to masks, colours, overlays, videos and shares."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import evaluate, padding, pictures, predict, protocols, sharding
from duc_dlc_jax.data import inputs, threads
from duc_dlc_jax.data.labels import DataError, label_spec
from duc_dlc_jax.export import runtimes
from duc_dlc_jax.labelling import BundlePredictor, Predictor
from networks import images_of, jit, network

SPEC = label_spec("camvid")


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)


def labelling_of(protocol):
    model, variables, _ = network("corners", "float32")
    variables = jax.device_put(variables, sharding.replicated(sharding.make_mesh()))
    return predict.Labelling(Predictor(model, protocol), variables)


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "shares.jsonl").read_text().splitlines()]


def write_video(path, frames, code="MJPG", rate=5.0):
    height, width = frames[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, (width, height))
    for frame in frames:
        video.write(frame)
    video.release()


# Labelling


def test_a_folder_of_many_sizes_is_labelled_as_evaluate_does(tmp_path, monkeypatch):
    """To the pixel, in few programs; files that are no images are named, and cost nothing else."""
    monkeypatch.setattr(padding, "MOST_PROGRAMS", 2)
    images = images_of((33, 29), (17, 38), (40, 33), (40, 51), (20, 30))
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    out = tmp_path / "out"
    found = inputs.find([str(tmp_path)], out)
    protocol = protocols.Protocol(flip=True).planned([s for f in found if (s := f.size())])
    labelling = labelling_of(protocol)
    writer = predict.Writer(out, predict.OUTPUTS, SPEC, opacity=0.25)
    assert predict.predict(labelling, found, writer, writer) == 5
    assert labelling.predictor.programs()["network"] == 2
    assert labelling.predictor.compiling[1] == 2
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in labelling.problems] == [
        "cut.png",
        "empty.jpg",
    ]
    examples = [
        {"image": image, "label": np.zeros(image.shape[:2], np.uint8), "name": str(number)}
        for number, image in enumerate(images)
    ]
    model, _, _ = network("corners", "float32")
    evaluator = evaluate.Evaluator(model, SPEC, 1, protocol)
    lines = {line["name"]: line for line in lines_of(out)}
    for example in evaluator.predictions(labelling.variables, examples):
        name, ids = example["name"], example["prediction"]
        np.testing.assert_array_equal(read(out / "ids" / f"{name}.png"), ids)
        colours = SPEC.colourise(ids)
        np.testing.assert_array_equal(read(out / "colour" / f"{name}.png"), colours)
        mixed = np.round(0.75 * example["image"] + 0.25 * colours)  # exact: quarters
        np.testing.assert_array_equal(read(out / "overlay" / f"{name}.png"), mixed)
        line = lines.pop(name)
        assert (line["height"], line["width"]) == ids.shape
        counts = [int((ids == k).sum()) for k in range(11)]
        assert line["pixels"] == dict(zip(SPEC.classes, counts, strict=True))
        assert sum(line["share"].values()) == pytest.approx(1, abs=1e-5)
    assert not lines
    with Image.open(out / "ids" / "0.png") as ids, Image.open(out / "legend.png") as legend:
        assert ids.getpalette()[: 3 * 11] == list(np.ravel(SPEC.palette))
        assert legend.width == predict.LEGEND_WIDTH


def test_a_video_becomes_a_video_of_overlays_and_masks_per_frame(tmp_path):
    frames = [np.full((48, 64, 3), 30 * i, np.uint8) for i in range(7)]
    write_video(tmp_path / "drive.avi", frames)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "drive.avi").read_bytes()[:200])
    out = tmp_path / "out"
    found = inputs.find([str(tmp_path / "*.*")], out)
    assert {source.name: source.size() for source in found} == {"drive": (48, 64), "cut": None}
    labelling = labelling_of(protocols.Protocol())
    writer = predict.Writer(out, predict.OUTPUTS, SPEC)
    assert predict.predict(labelling, found, writer, writer) == 7
    assert labelling.problems == [f"{tmp_path / 'cut.mp4'}: OpenCV finds no video in it"]
    overlay = inputs.Video(out / "overlay" / "drive.mp4")
    assert (overlay.size, overlay.rate, overlay.frames) == ((48, 64), 5, 7)
    lines, shown = lines_of(out), list(overlay)
    assert [(line["frame"], line["seconds"]) for line in lines] == [(i, i / 5) for i in range(7)]
    _, _, apply = network("corners", "float32")
    for number, image in enumerate(inputs.Video(tmp_path / "drive.avi")):
        assert abs(image.astype(int) - frames[number]).max() < 8  # in their order; lossy
        ids = read(out / "ids" / "drive" / f"{number:06d}.png")
        expected = np.asarray(apply(labelling.variables, image[None]))[0].argmax(-1)
        assert (ids == expected).mean() > 0.999
        assert lines[number]["pixels"]["sky"] == (ids == 0).sum()
        drawn = pictures.overlay(image, ids, SPEC)
        assert abs(shown[number].astype(int) - drawn).mean() < 16  # MPEG-4


def test_only_the_wanted_outputs_are_written(tmp_path):
    (image,) = images_of((40, 51))
    Image.fromarray(image).save(tmp_path / "a.png")
    writer = predict.Writer(tmp_path / "out", ("shares",), SPEC)
    found = inputs.find([str(tmp_path / "a.png")], tmp_path / "out")
    predict.predict(labelling_of(protocols.Protocol()), found, writer, writer)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shares.jsonl"]


# The command


class Quick:
    """In a labeller's place: all pixels are of class 1; images wider than 100 pixels do not fit."""

    def __call__(self, variables, images, labels, sizes):
        if images.shape[2] > 100:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return np.zeros((11, 11), np.int32), np.ones(labels.shape, np.uint8)

    def programs(self):
        return {"network": 1, "other": 0}


def quick_predictor():
    model = SimpleNamespace(resize_grid="corners", logit_stride=8)
    predictor = Predictor(model, protocols.Protocol())
    predictor._labeller = Quick()
    return predictor


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs it on tmp_path/in into tmp_path/out; returns the batch size that it asked for."""

    def run(predictor=None, **changed):
        config, batches = config_lib.default(), []
        config.eval.batch_size = 4
        loaded = SimpleNamespace(config=config, spec=SPEC, model=None, variables={})
        monkeypatch.setattr(predict.workdirs, "load_any", lambda *_: loaded)

        def made(model, protocol, batch):
            batches.append(batch)
            return predictor or quick_predictor()

        monkeypatch.setattr(predict, "make_predictor", made)
        monkeypatch.setattr(predict, "is_bundle", lambda path: True)
        args = {"model": "m", "checkpoint": "best", "format": "", "protocol": "", "set": []}
        args |= {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
        args |= {"outputs": [], "opacity": 0.5} | changed
        monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**args))
        predict.main([])
        return batches[0]

    (tmp_path / "in").mkdir()
    return run


def write_images(folder, **sizes):
    for name, (image,) in {name: images_of(size) for name, size in sizes.items()}.items():
        Image.fromarray(image).save(folder / f"{name}.png")


def test_what_does_not_fit_the_memory_costs_nothing_else(tmp_path, command, capsys):
    write_images(tmp_path / "in", a=(20, 30), b=(20, 120), c=(30, 20))
    write_video(tmp_path / "in" / "wide.avi", [np.zeros((48, 128, 3), np.uint8)] * 3)
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == "\n".join(
        ["problems with 2 of 4 files:"]
        + [f"{tmp_path / 'in' / name}: {predict.TOO_LARGE}" for name in ("b.png", "wide.avi")]
    )
    assert [line["name"] for line in lines_of(tmp_path / "out")] == ["a", "c"]
    assert (tmp_path / "out" / "legend.png").is_file()
    assert not list((tmp_path / "out").rglob("*.mp4"))
    assert "2 images in" in capsys.readouterr().out


def test_nothing_readable_is_code_2_and_leaves_nothing(tmp_path, command):
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 of 1 files:\n.*a\.png: 1 bytes .* WebP, BMP or TIFF"):
        command()
    assert not (tmp_path / "out").exists()


def test_an_error_that_is_no_fault_of_a_file_ends_the_command(tmp_path, command):
    write_images(tmp_path / "in", a=(20, 30))
    predictor = quick_predictor()
    predictor._label = None
    with pytest.raises(TypeError, match="not callable"):
        command(predictor)


def test_a_bundle_of_one_size_labels_the_images_that_have_it(tmp_path, command):
    bundle = SimpleNamespace(path="b", size=(48, 64), manifest={"input": {"min_side": 32}})

    class Model:
        num_classes = 11

        def __call__(self, images):
            if images.shape[1] > 100:  # in the words of ONNX Runtime
                raise RuntimeError("[E] Failed to allocate memory for requested buffer of size 9")
            runtimes.check_size(bundle, images.shape[1:3])
            return np.ones(images.shape[:3], np.uint8)

    write_images(tmp_path / "in", a=(48, 64), b=(64, 48), c=(48, 64), d=(120, 64))
    with pytest.raises(SystemExit) as end:
        command(BundlePredictor(Model()))
    problem = f"{tmp_path / 'in' / 'b.png'}: an image of 64x48; b takes 48x64 alone"
    assert end.value.code.startswith(f"problems with 2 of 4 files:\n{problem}")
    assert end.value.code.endswith(f"{tmp_path / 'in' / 'd.png'}: {predict.TOO_LARGE}")
    assert [line["name"] for line in lines_of(tmp_path / "out")] == ["a", "c"]


def test_the_command_hands_its_flags_on(tmp_path, command):
    write_images(tmp_path / "in", a=(20, 30))
    write_video(tmp_path / "in" / "drive.avi", [np.zeros((48, 64, 3), np.uint8)] * 2)
    assert command(opacity=0.25) == 1  # a lone image costs one
    out = tmp_path / "out"
    written = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert written == {
        *("ids/a.png", "colour/a.png", "overlay/a.png"),
        *("overlay/drive.mp4", "shares.jsonl", "legend.png"),
    }
    mixed = np.round(0.75 * read(tmp_path / "in" / "a.png") + 0.25 * read(out / "colour" / "a.png"))
    np.testing.assert_array_equal(read(out / "overlay" / "a.png"), mixed)
    assert command(outputs=["ids"], set=["batch_size=3"]) == 3
    assert len(list((out / "ids" / "drive").iterdir())) == 2


def test_inputs_of_one_size_share_batches(tmp_path, command, monkeypatch):
    """On accelerators up to the configuration's four at once; a video counts its frames."""
    write_images(tmp_path / "in", **{f"i{i}": (48, 64) for i in range(3)})
    assert command() == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert command() == 3
    write_video(tmp_path / "in" / "drive.avi", [np.zeros((48, 64, 3), np.uint8)] * 2)
    assert command() == 3  # 5 are 3 and 2
    monkeypatch.setattr(predict, "PIXELS_AT_ONCE", 2 * 48 * 64)
    assert command() == 2
    write_images(tmp_path / "in", turned=(64, 48))
    assert command() == 1


def test_a_video_that_ends_too_early_is_named(tmp_path, command):
    frames = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(8)]
    path = tmp_path / "in" / "cut.avi"
    write_video(path, frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SystemExit) as end:
        command()
    done = len(lines_of(tmp_path / "out"))
    assert 1 < done < 6
    problem = f"{path}: ends after {done} of 8 frames"
    assert end.value.code == f"problems with 1 of 1 files:\n{problem}"


# Finding and reading


def test_files_folders_and_patterns_are_found_under_names_of_their_own(tmp_path):
    for name in ("a/x.png", "a_x.png", "b/x.jpg", "b/x.png", "b/.hidden.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    out = tmp_path / "out" / "overlay"
    out.mkdir(parents=True)
    (out / "x.png").write_bytes(b"")

    def names(*texts):
        found = inputs.find([str(tmp_path / text) for text in texts], tmp_path / "out")
        return {source.name: str(source.path.relative_to(tmp_path)) for source in found}

    assert names(".") == {
        "a_x_png": "a/x.png",
        "a_x_png_2": "a_x.png",
        "b_x_jpg": "b/x.jpg",
        "b_x_png": "b/x.png",
    }
    assert names("b/*.png", "a_x.png") == {"x": "b/x.png", "a_x": "a_x.png"}
    assert names("**/x.png") == {"a_x": "a/x.png", "b_x": "b/x.png"}
    assert names("b/notes.txt") == {"notes": "b/notes.txt"}  # named by the user: tried
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.gif").write_bytes(b"")
    for text, reason in (
        ("c", "no file"),
        ("b/*.gif", "no file"),
        ("d", r"no file that ends with \.png"),
        ("out", "nothing but files in --output=.*/out, which is passed over"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"--input=\S+: {reason}"):
            names(text)
    (tmp_path / "links" / "way").mkdir(parents=True)
    (tmp_path / "links" / "way" / "b").symlink_to(tmp_path / "b")
    assert set(names("links")) == {"way_b_x_jpg", "way_b_x_png"}


def test_what_a_folder_has_besides_is_counted(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.gif", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert len(inputs.find([str(tmp_path)], tmp_path / "out")) == 1
    assert f"passed over 2 .gif, 1 .txt, first {tmp_path / 'b.gif'}" in caplog.text


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_headers_say_the_size_of_the_turned_image(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / f"x.{suffix}", exif=exif)
    (source,) = inputs.find([str(tmp_path / f"x.{suffix}")], tmp_path / "out")
    assert source.size() == source.image().shape[:2] == ((30, 20) if orientation > 4 else (20, 30))


def test_a_tiff_of_floats_is_refused_by_its_depth(tmp_path):
    Image.fromarray(np.zeros((20, 30), np.float32)).save(tmp_path / "x.tif")
    (source,) = inputs.find([str(tmp_path / "x.tif")], tmp_path / "out")
    assert "TIFF of 8 or 16 bits a channel; it has 32" in source.image()


def test_ahead_keeps_the_order_and_hands_errors_on():
    def items():
        yield from range(5)
        raise OSError("gone")

    stream = threads.ahead(items(), 3)
    assert [next(stream) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="gone"):
        next(stream)
