"""`python -m duc_dlc_jax.predict --model=MODEL --input=PATH --output=DIR`: labels of pictures.

MODEL is the workdir of a run, or a bundle that `duc_dlc_jax.export` wrote.

--input is an image, a video, a folder of them or a pattern in quotes, and may be given repeatedly.
By default an image NAME becomes

ids/NAME.png        train ids; a palette PNG, so that viewers show colours
colour/NAME.png     the ids as colours
overlay/NAME.png    the colours over the image
shares.jsonl        a line per image: its size, and pixels and share of each class
legend.png          colour, train id and name of each class

and a video overlay/NAME.mp4 and its lines, one per frame. Images are taken at their own size,
turned as their EXIF orientation says, and labelled as `evaluate` does.

Exit code 0: all is labelled; 1: some files could not be read or labelled, or not to their end, and
are named with the reason at the end, the others are done; 2: nothing was done.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import cv2
import jax
import numpy as np
from absl import flags
from etils import epath
from PIL import ImageOps

from duc_dlc_jax import cli, pictures, progress, protocols, storage, workdirs
from duc_dlc_jax.data import drawing, inputs
from duc_dlc_jax.data.inputs import Input, Video
from duc_dlc_jax.data.labels import DataError, LabelSpec
from duc_dlc_jax.data.threads import ahead, in_order
from duc_dlc_jax.export.bundle import is_bundle
from duc_dlc_jax.export.runtimes import FORMS
from duc_dlc_jax.labelling import BundlePredictor, Examples, Predictor, make_predictor

OUTPUTS = ("ids", "colour", "overlay", "shares", "legend")
OF_VIDEOS = ("overlay", "shares", "legend")  # unless --outputs names others
LEGEND_WIDTH = 800  # pixels
PIXELS_AT_ONCE = 1024 * 2048  # of images in one batch, unless --set=batch_size says more
AHEAD = 8  # frames of a video that are decoded in advance
NO_MEMORY = ("RESOURCE_EXHAUSTED", "Failed to allocate memory", "bad_alloc")  # JAX, ONNX Runtime
TOO_LARGE = (
    "needs more memory than there is: try --protocol=sliding, or fewer at once with "
    "--set=batch_size=1, or shrink it"
)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes what is wanted of one image; safe in several threads."""

    folder: epath.Path
    outputs: tuple[str, ...]
    spec: LabelSpec
    opacity: float = 0.5

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.outputs if kind in ("ids", "colour", "overlay"))

    def image(self, example: dict[str, Any]) -> dict[str, Any]:
        """Writes {name, path, image, prediction}; returns its line of shares."""
        for kind in self.pictures:
            path = self.folder / kind / f"{example['name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "ids":
                pictures.write_ids(path, example["prediction"], self.spec)
            else:
                pictures.write_png(path, self.drawn(kind, example))
        return self.line(example)

    def drawn(self, kind: str, example: dict[str, Any]) -> np.ndarray:
        """The colours, or these over the image: RGB uint8 [H, W, 3]."""
        if kind == "colour":
            return self.spec.colourise(example["prediction"])
        return pictures.overlay(example["image"], example["prediction"], self.spec, self.opacity)

    def line(self, example: dict[str, Any]) -> dict[str, Any]:
        """Size in pixels, and pixels and share of each class, by name in order of train ids."""
        ids = example["prediction"]
        pixels = np.bincount(ids.ravel(), minlength=self.spec.num_classes).tolist()
        named = dict(zip(self.spec.classes, pixels, strict=True))
        head = {key: example[key] for key in ("name", "path", "frame", "seconds") if key in example}
        return head | {
            "height": ids.shape[0],
            "width": ids.shape[1],
            "pixels": named,
            "share": {name: round(count / ids.size, 6) for name, count in named.items()},
        }


class FrameWriter:
    """Writes the frames of one video in their order: videos of pictures, ids as a PNG each.

    Files are begun with the first frame: of a video that cannot be labelled there are none.
    """

    def __init__(self, writer: Writer, name: str, video: Video):
        self._writer, self._name, self._video = writer, name, video
        self._videos: dict[str, cv2.VideoWriter] = {}

    def _begin(self) -> None:
        height, width = self._video.size
        for kind in self._writer.pictures:
            folder = self._writer.folder / kind
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "ids":
                (folder / self._name).mkdir(exist_ok=True)
                continue
            path, code = folder / f"{self._name}.mp4", cv2.VideoWriter.fourcc(*"mp4v")
            self._videos[kind] = cv2.VideoWriter(str(path), code, self._video.rate, (width, height))
            if not self._videos[kind].isOpened():
                raise OSError(f"{path}: OpenCV cannot write a video of {width}x{height} pixels")

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        if example["frame"] == 0:
            self._begin()
        for kind in self._writer.pictures:
            if kind == "ids":
                file = f"{example['name']}/{example['frame']:06d}.png"
                path = self._writer.folder / kind / file
                pictures.write_ids(path, example["prediction"], self._writer.spec)
            else:
                frame = self._writer.drawn(kind, example)
                self._videos[kind].write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        return self._writer.line(example)

    def close(self) -> None:
        for video in self._videos.values():
            video.release()


@dataclasses.dataclass
class Labelling:
    """A network under a protocol, and the problems it met."""

    predictor: Predictor | BundlePredictor
    variables: dict[str, Any]
    problems: list[str] = dataclasses.field(default_factory=list)

    def images(self, found: list[Input], writer: Writer) -> Iterator[dict[str, Any]]:
        """Labels and writes images; their lines of shares. Threads read ahead and write."""

        def examples():
            for source, image in in_order(lambda source: (source, source.image()), found):
                if isinstance(image, str):
                    self.problems.append(image)
                else:
                    yield {"name": source.name, "path": str(source.path), "image": image}

        yield from in_order(writer.image, self._labelled(examples(), self._left_out))

    def video(self, source: Input, writer: Writer) -> Iterator[dict[str, Any]]:
        """Labels and writes a video; the lines of its frames."""
        try:
            video = Video(source.path)
        except DataError as error:
            self.problems.append(str(error))
            return

        def examples():
            for number, image in enumerate(ahead(video, AHEAD)):
                where = {"frame": number, "seconds": round(number / video.rate, 6)}
                yield {"name": source.name, "path": str(source.path), "image": image} | where

        frames, count = FrameWriter(writer, source.name, video), 0
        try:
            for line in in_order(frames, self._labelled(examples()), threads=1):
                count += 1
                yield line
        except Exception as error:
            self._left_out(error, [{"path": source.path}])
            return
        finally:
            frames.close()
        if count < video.frames - 1:
            self.problems.append(f"{source.path}: ends after {count} of {video.frames} frames")

    def _labelled(self, examples, *failed):
        for batch, _ in self.predictor.batches(self.variables, examples, *failed):
            yield from batch

    def _left_out(self, error: Exception, examples: Examples) -> None:
        """Notes why these are not labelled; raises what would keep others from it as well."""
        if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
            reason = TOO_LARGE
        elif isinstance(error, DataError):  # a bundle takes other sizes
            reason = str(error)
        else:
            raise error
        self.problems += [f"{example['path']}: {reason}" for example in examples]


def predict(labelling: Labelling, found: list[Input], images: Writer, videos: Writer) -> int:
    """Labels everything found; returns the number of images and frames.

    Shows the progress, writes the lines of shares and at the end the legend.
    """
    stills = [source for source in found if not source.is_video]
    films = [source for source in found if source.is_video]
    shares = None

    def lines():
        yield from labelling.images(stills, images)
        for source in films:
            yield from labelling.video(source, videos)

    total, seen, done = len(stills) + sum(map(_frames, films)), set(), 0
    try:
        for line in progress.shown(lines(), total, "image"):
            done += 1
            seen |= {k for k, count in enumerate(line["pixels"].values()) if count}
            if not shares and "shares" in images.outputs:
                images.folder.mkdir(parents=True, exist_ok=True)
                shares = storage.Lines(images.folder / "shares.jsonl", [])
            if shares:
                shares.write(json.dumps(line, ensure_ascii=False))
    finally:
        if shares:
            shares.close()
    if done and "legend" in images.outputs:
        legend = drawing.legend(images.spec, LEGEND_WIDTH - 2 * drawing.GAP, seen)
        framed = ImageOps.expand(legend, drawing.GAP, drawing.PAPER)
        framed.save(images.folder / "legend.png")
    return done


def at_once(found: list[Input], sizes: list[tuple[int, int]], most: int) -> int:
    """Images of a batch: up to `most` where all have one size, and as many in each batch.

    sizes: (height, width) of those that can be read. Where there are several most batches would
    be filled up, in memory and time too, and with more pixels than `PIXELS_AT_ONCE` an image that
    fits alone might not. On a CPU one by one is faster.
    """
    if len(set(sizes)) != 1 or jax.default_backend() == "cpu":
        return 1
    count = sum(_frames(source) if source.is_video else 1 for source in found)
    most = min(most, PIXELS_AT_ONCE // math.prod(sizes[0]))
    return math.ceil(count / math.ceil(count / most)) if most > 1 and count else 1


def _frames(source: Input) -> int:
    try:
        return Video(source.path).frames
    except DataError:
        return 0


def throughput(done: int, seconds: float, predictor: Predictor | BundlePredictor) -> str:
    """How fast it went, the first batch of each program apart: it waits for the compiler."""
    slow, images = predictor.compiling
    text = f"{done} images in {seconds:.1f} s"
    if done > images:
        rate = (done - images) / max(seconds - slow, 1e-9)
        return (
            f"{text}: {slow:.1f} s for {images} while programs compiled, then {rate:.2f} images/s"
        )
    return f"{text}, all of them while programs compiled"


def main(_) -> None:
    args = flags.FLAGS
    if not is_bundle(args.model):  # which stays as it is
        cli.use_compilation_cache(storage.path(args.model))
    output = storage.local("--output", args.output)
    storage.check(output, write=True, flag="--output")
    for text in args.input:
        storage.local("--input", text)
    found = inputs.find(args.input, output)
    run = workdirs.load_any(args.model, args.checkpoint, args.format)
    sizes = [size for size in in_order(Input.size, found) if size]
    batch = at_once(found, sizes, run.config.eval.batch_size)
    config = protocols.select(run.config, args.protocol, [f"batch_size={batch}", *args.set])
    protocol = protocols.Protocol.from_config(config).planned(sizes)
    predictor = make_predictor(run.model, protocol, config.eval.batch_size)
    labelling = Labelling(predictor, run.variables)
    wanted = functools.partial(Writer, output, spec=run.spec, opacity=args.opacity)
    start = time.monotonic()
    images = wanted(outputs=tuple(args.outputs or OUTPUTS))
    videos = wanted(outputs=tuple(args.outputs or OF_VIDEOS))
    done = predict(labelling, found, images, videos)
    count = len(labelling.problems)
    problems = "\n".join([f"problems with {count} of {len(found)} files:", *labelling.problems])
    if not done:
        raise DataError(problems)
    print(throughput(done, time.monotonic() - start, labelling.predictor))
    print(f"results in {output}; {protocol.sentence()}")
    if count:
        sys.exit(problems)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The workdir of a run, or a bundle.", required=True)
    flags.DEFINE_enum("format", "", ["", *FORMS], "Of a bundle; default: its first.")
    flags.DEFINE_multi_string("input", None, "Image, video, folder or pattern.", required=True)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    cli.define_names("outputs", OUTPUTS, "Only these; of videos ids and colour must be named.")
    flags.DEFINE_float("opacity", 0.5, "Of the colours in overlays.", 0.0, 1.0)
    cli.define_protocol()
    cli.run(main)
