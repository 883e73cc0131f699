"""`python -m duc_dlc_jax.submit --workdir=DIR --split=test --output=FILE.zip`: benchmark archives.

Predictions of a split as PNGs of the ids that the benchmark's server expects, in one flat zip
archive, which is read back and checked before it gets its name.
"""

from __future__ import annotations

import dataclasses
import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from duc_dlc_jax import cli, protocols, storage
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.labels import DataError, LabelSpec
from duc_dlc_jax.evaluate import Evaluator, open_run


@dataclasses.dataclass(frozen=True)
class Format:
    """How a server finds the prediction of an image: by the name of its file."""

    name: str  # regular expression of the records' names
    file: str  # "{name}" stands for the record's name


FORMATS = {
    # The server and cityscapesScripts look for CITY_SEQUENCE_FRAME*.png.
    "cityscapes": Format(r"[a-z-]+_\d{6}_\d{6}", "{name}_labelIds.png"),
    "ade20k": Format(r"ADE_\w+_\d{8}", "{name}.png"),
}


def write_archive(
    path: Path, spec: LabelSpec, examples: Iterable[dict[str, Any]], count: int
) -> None:
    """Writes {name, prediction: train ids uint8 [H, W]} of `count` images as `spec.submission_ids`.

    Raises ConfigError for a data set without a submission format, DataError for another number of
    images, for names that its server would not understand and where the archive, read back, is not
    what was to be written.
    """
    if spec.name not in FORMATS:
        raise ConfigError(
            f"no submission format for the data set {spec.name!r}; there are: {', '.join(FORMATS)}"
        )
    form, sizes = FORMATS[spec.name], {}
    ids = np.asarray(spec.submission_ids, np.uint8)
    with storage.whole_file(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed
            for example in examples:
                file = _file_name(form, example["name"])
                if file in sizes:
                    raise DataError(f"two records are named {example['name']}")
                sizes[file] = example["prediction"].shape
                buffer = io.BytesIO()
                Image.fromarray(ids[example["prediction"]]).save(buffer, "PNG")
                archive.writestr(file, buffer.getvalue())
        if len(sizes) != count:
            raise DataError(f"{path}: {len(sizes)} predictions for {count} images")
        check_archive(partial, spec, sizes)


def _file_name(form: Format, name: str) -> str:
    """The file of a record; its folders, as in berlin/berlin_000000_000019, are not kept."""
    base = name.rsplit("/", 1)[-1]
    if not re.fullmatch(form.name, base):
        raise DataError(f"record {name!r} has no name of the benchmark, {form.name}")
    return form.file.format(name=base)


def check_archive(path: Path, spec: LabelSpec, sizes: dict[str, tuple[int, int]]) -> None:
    """Raises DataError unless the archive holds these files alone, of these sizes and known ids."""
    allowed = set(spec.submission_ids)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(sizes):
            wrong = sorted(set(names) ^ set(sizes)) or names
            raise DataError(f"{path}: {len(names)} files for {len(sizes)} images; {wrong[:3]}")
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                mode, pixels = image.mode, np.asarray(image)
            if mode != "L" or pixels.shape != sizes[name]:
                raise DataError(
                    f"{path}: {name} is {mode} {pixels.shape}, not 8-bit grey {sizes[name]}"
                )
            if unknown := set(np.unique(pixels).tolist()) - allowed:
                raise DataError(f"{path}: {name} has ids {sorted(unknown)}, which are no class's")


def main(_) -> None:
    args = flags.FLAGS
    output = Path(storage.local("--output", args.output))
    storage.check(output, write=True, flag="--output", file=True)
    run, records = open_run(args, args.workdir)
    config = protocols.select(run.config, args.protocol, args.set)
    protocol = protocols.Protocol.from_config(config).planned(records.sizes())
    evaluator = Evaluator(run.model, run.spec, config.eval.batch_size, protocol)
    predictions = evaluator.predictions(run.variables, pipeline.eval_examples(records))
    write_archive(output, run.spec, predictions, len(records))
    print(f"{len(records)} images of {args.split} in {args.output}, checked; {protocol.sentence()}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "What training wrote.", required=True)
    flags.DEFINE_string("split", "test", "Whose images to label.")
    flags.DEFINE_string("output", None, "The archive to write, FILE.zip.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    flags.DEFINE_string("data_dir", "", "Default: the configuration's data.dir.")
    cli.define_protocol()
    cli.run(main)
