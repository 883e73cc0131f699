"""`python -m duc_dlc_jax.export --workdir=DIR --output=BUNDLE`, or `--verify=BUNDLE`.

Writes the trained network as a bundle (docs/conversion.md) once it has answered, in its own runtime
and a fresh process, as the trained network does; otherwise nothing is written.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from absl import flags

from duc_dlc_jax import cli, storage, workdirs
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import folding, gate, manifest, onnx_graph, stablehlo

BUILDERS = {"stablehlo": stablehlo.build, "onnx": onnx_graph.build}


def export(run: workdirs.Run, output: Path, options: manifest.Options, images: str = "") -> dict:
    """Writes the bundle `output` and returns its manifest.

    images: a folder of photos for the gate; "": the run's evaluation split, or drawn scenes.

    Raises ConfigError for an output that exists and for what a format cannot hold, GateError (and
    leaves nothing behind) where a model does not answer as the trained network.
    """
    if output.exists():
        raise ConfigError(f"--output={output} exists: remove it, or name another")
    options.check()
    photos, origin = _photos(run, images)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        network = folding.FoldedNetwork(run.model, run.variables, options.numpy_dtype)
        # Classes alone would hide small faults: the same network is checked with logits, too.
        kinds = dict.fromkeys((options.output_kind, "logits"))
        paths = [Path(folder, kind) for kind in kinds]
        for path, kind in zip(paths, kinds, strict=True):
            _write_models(path, run, network, dataclasses.replace(options, output_kind=kind))

        tolerance = gate.tolerance_of(options.dtype)
        batches = gate.pairs(photos, options.size)
        expected = [
            gate.Expected.of(gate.reference(run.model, run.variables, batch), tolerance)
            for batch in batches
        ]
        content = bundles.read(paths[0]).manifest
        content["gate"] |= {"tolerance": tolerance, "images": f"{origin}, and drawn scenes"}
        for form in options.formats:
            content["gate"][form] = gate.check(paths, form, batches, expected, tolerance)
        gate.write_check(paths[0], batches, expected)
        if "stablehlo" in options.formats:
            content["gate"]["stablehlo_platform"] = gate.platform()
        bundles.write(paths[0], content)
        gate.verify(paths[0], count=1)  # what was written, and a batch of 1
        shutil.move(paths[0], output)
    return content


def _write_models(path: Path, run: workdirs.Run, network, options: manifest.Options) -> None:
    path.mkdir()
    for form in options.formats:
        built = BUILDERS[form](network, options.size, options.input, options.output_kind)
        (path / bundles.FILES[form]).write_bytes(built)
    bundles.write(path, manifest.describe(run, options))


def _photos(run: workdirs.Run, images: str) -> tuple[list, str]:
    """Images for the gate, and what they are."""
    count = len(gate.SIZES)
    if images:
        return gate.read_photos(images, count), "photos of --images"
    data = run.config.data
    try:
        records = open_records(data, data.eval_split)
    except (FileNotFoundError, ConfigError):
        drawn = [gate.scenes.draw("train", i)[0] for i in range(count)]
        return drawn, f"drawn scenes, as {data.name} is not prepared"
    photos = [records[i]["image"] for i in range(min(count, len(records)))]
    return photos, f"{data.name} {data.eval_split}"


def _size(text: str) -> tuple[int, int] | None:
    if text == "dynamic":
        return None
    height, width = cli.parsed_size("size", text)
    if min(height, width) < stablehlo.MIN_SIDE:
        raise ConfigError(f"--size={text}; sides must have at least {stablehlo.MIN_SIDE} pixels")
    return height, width


def main(_) -> None:
    args = flags.FLAGS
    if args.verify:
        _report(gate.verify(args.verify), args.verify)
        return
    if not (args.workdir and args.output):
        raise ConfigError("--workdir=DIR and --output=BUNDLE are needed, or --verify=BUNDLE")
    options = manifest.Options(
        tuple(args.format), args.input, args.output_kind, args.dtype, _size(args.size)
    )
    output = Path(storage.local("--output", args.output))
    storage.check(output, write=True, flag="--output")
    cli.use_compilation_cache(storage.path(args.workdir))
    run = workdirs.load(args.workdir, args.checkpoint)
    content = export(run, output, options, args.images)
    _report({form: content["gate"][form] for form in options.formats}, args.output)


def _report(figures: dict[str, list], path: str) -> None:
    for form, listed in figures.items():
        for one in listed:
            difference = one.get("max_difference")
            shown = "" if difference is None else f"max |difference| {difference:.1e}  "
            size = f"{one['height']}x{one['width']}"
            print(f"{form:<10} {size:<10} {shown}agreement {one['agreement']:.6f}")
    print(f"{path}: answers as the trained network does")


def guarded(argv) -> None:
    try:
        main(argv)
    except gate.GateError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The workdir of a run.")
    flags.DEFINE_string("output", "", "The bundle, a folder that does not exist yet.")
    cli.define_names("format", tuple(BUILDERS), "Of the model.", default=tuple(BUILDERS))
    flags.DEFINE_enum("input", "uint8", ["uint8", "float32"], "RGB, or normalised RGB.")
    flags.DEFINE_enum("output_kind", "ids", list(folding.OUTPUTS), "Classes, or their logits.")
    flags.DEFINE_enum("dtype", "float32", list(gate.TOLERANCE), "Of weights and activations.")
    flags.DEFINE_string("size", "dynamic", "HEIGHTxWIDTH in pixels, or dynamic.")
    flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    flags.DEFINE_string("images", "", "Photos for the gate; default: the run's evaluation split.")
    flags.DEFINE_string("verify", "", "Check this bundle instead, from what it holds.")
    cli.run(guarded)
