"""`python -m duc_dlc_jax.benchmark --what=train,infer --config=configs/X.py`: speed.

train  the training step: all devices, donated state, random uint8 pictures of the crop size
infer  the labelling of one image of --size (the crop's without) on one device
input  crops/s of one core from prepared records, beside PyTorch's DataLoader; --synthetic draws
       the images; --formats compares ways to store them instead
fed    training steps fed by the input pipeline beside steps that get one batch again and again
layers dilated convolutions, their gradients, and the loss, in each way there is
networks the training step of each of --networks, and of the configuration's under --xla_options
memory the largest batch per device, of each of --networks or of the configuration
growth how FLOPs, bytes and memory of the step grow with pixels, batch, classes and depth

train, infer and growth need no data. The first two say which share of the layer-wise floor is
reached, with --profile where the time goes, and with --peer=torch how PyTorch does the
same network, way by way, in rounds that alternate with ours.

With `--evaluate=1024x2048` it times instead how one image of this size is labelled by `--protocol`,
and says the most memory that the process had: start a process for each figure.

--json is written after each figure, and keeps what the file held. Of train, infer, fed, layers,
networks and memory, what is there for the same configuration, options, devices and versions is not
measured again unless --again says so, and with --stop_after_s none is begun that might end later,
by what those before it took or, of the first, by an estimate: the last line names them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, protocols, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.benchmark import floor, formats, growth, inputs, layers, memory, model, networks
from duc_dlc_jax.benchmark import peer as peers
from duc_dlc_jax.benchmark.figures import Figures, conditions
from duc_dlc_jax.data import photos
from duc_dlc_jax.models import segmenter

KINDS = ("train", "infer", "input", "fed", "layers", "networks", "memory", "growth")


def show_rates(what: str, r: dict[str, Any]) -> None:
    """Prints what `model.timed_step` returned, or why there is nothing."""
    if "failed" in r:
        print(f"{what}: failed: {r['failed']}")
        return
    size = "x".join(map(str, r["image"]))
    speed = f"{r['images_per_second']:.1f} images/s, {r['flop_per_second'] / 1e12:.3f} TFLOP/s"
    share = f"{100 * r['floor_share']:.0f}% of the layer-wise floor"
    if "folded_floor_seconds" in r:
        share += f" ({100 * r['folded_floor_seconds'] / r['seconds']:.0f}% with BN folded)"
    print(
        f"{what}, batch {r['batch_size']}, {size}: {1000 * r['seconds']:.1f} ms, {speed}, {share}"
    )
    print(f"memory of the program: {r['peak_bytes_per_device'] / 2**20:,.0f} MiB per device")


def show_way(what: str, way: str, row: dict[str, Any]) -> None:
    """Prints what `model.beside_peer` returned."""
    if "failed" in row:
        print(f"{what}, PyTorch, {way}: failed: {row['failed']}")
        return
    pairs = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
    seconds = f"{1000 * row['seconds']:.1f} ms, g(I) as {row['guidance']}"
    print(f"{what}, PyTorch, {way}: {seconds}; its time over ours: {pairs}")


def show_fastest(what: str, ways: dict[str, dict[str, Any]]) -> None:
    """Prints the ratio of PyTorch's fastest way, if one ran."""
    if timed := {way: row for way, row in ways.items() if "seconds" in row}:
        best = min(timed, key=lambda way: timed[way]["seconds"])
        ratio = np.median(timed[best]["ratios"])
        print(f"{what}: PyTorch's time over ours: {ratio:.2f} ({best})")


def show_profile(what: str, r: dict[str, Any]) -> None:
    """Prints what `model.profiled` returned."""
    theirs = r.get("peer_groups", {})
    print(f"{what}, by the profile:")
    for row in r["profile"]:
        least = r["floor_by_group"].get(row["group"], 0)
        beside = theirs.get(row["group"])
        peer = "" if beside is None else f", PyTorch's {1e3 * beside:.3f} ms"
        print(
            f"  {row['group']:<12}{row['direction']:<10}{1e3 * row['seconds']:>9.3f} ms"
            f"{row['kernels']:>8.0f} kernels   (group's floor {1e3 * least:.3f} ms{peer})"
        )


def peer_of(args: Any, work: model.Work, kinds: list[str]) -> peers.Peer:
    """PyTorch with the network, which it was seen to compute alike."""
    image = np.random.default_rng(0).integers(0, 256, (1, *work.size, 3), np.uint8)
    data = model.random_batch(args.config, work.classes)
    peer = peers.Peer(work, data, image, kinds, args.threads)
    found = ", ".join(f"{name} by {value:.1e}" for name, value in peer.differences.items())
    print(f"PyTorch {peer.version} differs (relative): {found}")
    return peer


def rates(args: Any, kinds: list[str], figures: Figures) -> None:
    """Measures and prints `train`, `infer`, `networks` and `memory`."""
    size = cli.parsed_size("size", args.size) if args.size else None
    plan = networks.plan(args.config, args.networks, args.xla_options)
    of = functools.partial(conditions, steps=args.steps, rounds=args.rounds)
    config_lib.validate(args.config)
    dtype = args.config.model.dtype
    ceilings = figures.once(
        ("ceilings",), conditions(None, dtype=dtype), lambda: floor.ceilings(dtype)
    )
    if ceilings is None:
        return
    work = model.Work(args.config, size, ceilings)
    figures.update(work.setting())
    print("{devices} x {device}, {dtype}, {classes} classes, JAX {jax}".format(**work.setting()))
    if {"train", "infer"} & set(kinds):
        beside_peer(args, kinds, work, figures)
    if "networks" in kinds:
        for name, (config, options) in plan.items():
            call = functools.partial(networks.timed, work, config, options, args.steps, args.rounds)
            if row := figures.once(("networks", name), of(config, options=options), call):
                show_rates(name, row)
    if "memory" in kinds:
        named = {name: plan[name][0] for name in args.networks} or {"configured": args.config}
        for name, config in named.items():
            measure_memory(name, config, ceilings, args.memory_gib, figures)


def beside_peer(args: Any, kinds: list[str], work: model.Work, figures: Figures) -> None:
    """Measures and prints `train` and `infer`: ours, PyTorch's ways, the profiles."""
    if args.peer:
        peers.check()
        peers.check_config(args.config, kinds, work.mesh.size)
    of: dict[str, dict[str, Any]] = {}

    @functools.cache
    def program(what: str) -> model.Step | model.Labelling:
        return work.step() if what == "train" else model.Labelling(work)

    for what in (what for what in ("train", "infer") if what in kinds):
        size = work.crop if what == "train" else work.size
        same = conditions(args.config, steps=args.steps, rounds=args.rounds, size=size)

        def ours(what: str = what) -> dict[str, Any]:
            return model.timed_step(work, program(what), args.steps, args.rounds, what)

        if row := figures.once((what,), same, ours):
            of[what] = same
            show_rates(what, row)
    if args.peer:
        measure_ways(args, of, work, program, figures)
    for what in of:
        row = figures.values[what]
        show_fastest(what, row.get("peer", {}).get("ways", {}))
        if args.profile and ("profile" in row or figures.time_for(what, "profile")):
            if "profile" not in row:
                row = figures.keep((what,), row | model.profiled(work, program(what)))
            show_profile(what, row)


def measure_ways(
    args: Any, of: dict[str, dict[str, Any]], work: model.Work, program: Any, figures: Figures
) -> None:
    """Measures and prints PyTorch's ways of what is in `of`: all kinds in one, then in the next."""
    peer: Any = None
    with contextlib.ExitStack() as stack:
        for way in args.ways:
            for what, setting in of.items():
                at = what, "peer", "ways", way
                same = setting | {"threads": args.threads}
                if peer is None and figures.found(at, same) is None:
                    if not figures.time_for("peer"):
                        return
                    peer = stack.enter_context(contextlib.closing(peer_of(args, work, list(of))))
                    said = {"torch": peer.version, "differences": peer.differences}
                    figures.update({"peer": said})

                def beside(peer: Any = peer, what: str = what, way: str = way) -> dict[str, Any]:
                    how = program(what), way, args.steps, args.rounds
                    return model.beside_peer(peer, what, *how)

                if row := figures.once(at, same, beside):
                    show_way(what, way, row)
        infer = figures.values.get("infer", {})
        if args.profile and peer and "infer" in of and "peer_groups" not in infer:
            figures.keep(("infer",), infer | {"peer_groups": peer.groups(5)})


def measure_memory(name: str, config: Any, ceilings: Any, gib: float, figures: Figures) -> None:
    """Finds and prints a row of `memory`; goes on with the programs that are known."""
    limit = memory.limit(gib)
    of = conditions(config, limit=limit)
    where = "memory", name
    half = figures.found((*where, "half"), of) or {}
    tried = {int(images): size for images, size in half.get("tried", {}).items()}

    def keep(known: dict[str, Any]) -> None:
        figures.keep(where, {"half": known | {"of": of}})

    call = functools.partial(memory.largest, config, ceilings, limit, tried, keep)
    if row := figures.once(where, of, call):
        memory.show(name, row)


def show_fed(name: str, result: dict[str, Any]) -> None:
    per_second = result["images_per_second"]
    print("{devices} x {device}".format(**result))
    print(
        f"{name}: fed by records {per_second['records']:.1f} images/s, "
        f"by one batch {per_second['one_batch']:.1f}"
    )
    print(f"ratio {result['ratio']:.3f}, by CPU time {result['cpu_ratio']:.3f}")


def measure_input(args: Any) -> dict[str, Any]:
    """Runs and prints `input`."""
    machine = inputs.machine()
    with tempfile.TemporaryDirectory() as folder:
        if args.formats:
            stored = formats.compare(args.config, args.steps, args.seconds)
            result = {"formats": stored}
            formats.show(stored)
        else:
            if args.synthetic:
                photos.prepare_photos(args.config.data.name, Path(folder), inputs.IMAGES)
                args.config.data.dir, args.config.data.train_split = folder, "train"
            result = inputs.compare(args.config, args.steps, args.seconds)
            inputs.show(result)
    return result | machine


def measure_layers(args: Any, figures: Figures) -> None:
    """Measures and prints `layers`: ours, the losses, then PyTorch's."""
    config, steps = args.config, args.steps
    dtype, batch = config.model.dtype, config.train.batch_size
    of = conditions(config, steps=steps)
    print(f"{of['device']}, {dtype}, batch {batch}")
    shapes = {layers.name(shape): shape for shape in layers.SHAPES}
    for name, shape in shapes.items():
        call = functools.partial(layers.row, shape, dtype, batch, steps)
        if row := figures.once(("layers", name), of, call):
            layers.show(name, row)
    for classes in (19, 150):
        named, arrays = layers.loss_functions(classes, batch, config.data.crop_size)
        for name, function in named.items():
            name = f"{classes} classes, {name}"
            call = functools.partial(layers.loss_row, function, *arrays, steps)
            if row := figures.once(("losses", name), of, call):
                layers.show_loss(name, row)
    if args.peer:
        where = "layers_torch"
        missing = {n: s for n, s in shapes.items() if figures.found((where, n), of) is None}
        if not missing or not figures.time_for(where):
            return
        for name, row in layers.torch_rows(missing, dtype, batch, steps):
            layers.show(name, figures.keep((where, name), row | {"of": of}))


def measure_fed(args: Any, figures: Figures) -> None:
    """Measures and prints a row of `fed`, named by what reads the records."""
    data = args.config.data
    name = f"workers={data.workers}" if data.workers else f"threads={data.threads}"
    name = "on_device" if data.on_device else name
    of = conditions(args.config, steps=args.steps)
    call = functools.partial(model.fed, args.config, args.steps)
    if row := figures.once(("fed", name), of, lambda: call() | inputs.machine()):
        show_fed(name, row)


def measure_growth(args: Any) -> dict[str, Any]:
    """Runs and prints `growth`; draws it with --plot."""
    axes = ("pixels", "batch", "classes", "blocks")
    chosen = (args.sizes, args.batches, args.classes, args.depths)
    values = {a: [int(v) for v in vs] for a, vs in zip(axes, chosen, strict=True) if vs}
    for axis, numbers in values.items():
        if len(numbers) < 2 or sorted(numbers) != numbers:
            raise config_lib.ConfigError(f"growth of {axis}: {numbers}; give two or more, rising")
    timed = axes if args.timed else ()
    found = growth.sweep(args.config, values, timed)
    print(growth.table(found))
    if args.plot:
        from duc_dlc_jax.benchmark import plots  # late: an extra

        plots.growth(found, Path(args.plot))
    slopes = {axis: growth.exponents(rows) for axis, rows in found.items()}
    return {"growth": found, "exponents": slopes, "jax": jax.__version__}


def measure_evaluation(args: Any) -> dict[str, Any]:
    """Runs and prints `--evaluate`."""
    config = protocols.select(args.config, args.protocol, args.set)
    result = model.evaluation(config, cli.parsed_size("evaluate", args.evaluate), args.steps)
    print("{device}, image {image}, {classes} classes: {protocol}".format(**result))
    print("{seconds:.2f} s, {images_per_second:.3f} images/s; programs {programs}".format(**result))
    print(f"most memory of the process: {result['peak_process_bytes'] / 2**30:.2f} GiB")
    if result["peak_device_bytes"]:
        print(f"most memory of the device: {result['peak_device_bytes'] / 2**30:.2f} GiB")
    return result


def main(_) -> None:
    args = flags.FLAGS
    if args.threads:  # before JAX counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    cli.use_deterministic_kernels(args.config.train.deterministic)
    segmenter.enable_dtype(args.config.model)
    if args.json:
        storage.check(args.json, write=True, flag="--json", file=True)
    figures = Figures(args.json, args.again, args.stop_after_s)
    if args.evaluate:
        figures.update(measure_evaluation(args))
        return
    if "layers" in args.what:
        measure_layers(args, figures)
    if {"train", "infer", "networks", "memory"} & set(args.what):
        rates(args, args.what, figures)
    if "growth" in args.what:
        figures.update(measure_growth(args))
    if "input" in args.what:
        figures.update(measure_input(args))
    if "fed" in args.what:
        measure_fed(args, figures)
    if figures.left:
        print(f"not begun, for want of time: {', '.join(figures.left)}; the same command goes on")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
    cli.define_names("what", KINDS, "What is timed.", default=("train", "infer"))
    flags.DEFINE_integer("steps", 5, "Calls of a round; rounds with --what=input.", 1)
    flags.DEFINE_integer("rounds", 5, "Rounds of train and infer.", 1)
    flags.DEFINE_string("size", "", "HEIGHTxWIDTH of the image that infer labels.")
    flags.DEFINE_enum("peer", "", ["", "torch"], "Also time PyTorch, in alternating rounds.")
    flags.DEFINE_multi_enum("ways", list(peers.WAYS), peers.WAYS, "Of PyTorch.")
    flags.DEFINE_integer("threads", 0, "Cores of this process and of PyTorch's; 0: all.", 0)
    flags.DEFINE_bool("profile", False, "Also say where the time goes.")
    flags.DEFINE_float("seconds", 4.0, "Of a round with --what=input.", 0.0)
    flags.DEFINE_bool("synthetic", False, "With --what=input: draw images like the data set's.")
    flags.DEFINE_bool("formats", False, "With --what=input: ways to store a 2048x1024 image.")
    flags.DEFINE_string("evaluate", "", "Time the labelling of an image of HEIGHTxWIDTH instead.")
    flags.DEFINE_list("sizes", ["128", "256", "512"], "With --what=growth: sides of the crops.")
    flags.DEFINE_list("batches", ["1", "2", "4", "8"], "With --what=growth: images a step.")
    flags.DEFINE_list("classes", ["19", "150", "1000"], "With --what=growth.")
    flags.DEFINE_list("depths", ["50", "101", "152"], "With --what=growth: of the ResNet.")
    of_networks = "With --what=networks: "
    named = "101/8@768x16: depth, output stride, crop and batch; +FIELD=VALUE for other fields."
    flags.DEFINE_list("networks", [], of_networks.replace("=networks", "=networks,memory") + named)
    options = "options of XLA, as in xla_gpu_deterministic_ops=true."
    flags.DEFINE_list("xla_options", [], of_networks + options)
    flags.DEFINE_bool("timed", False, "With --what=growth: also run the programs.")
    flags.DEFINE_string("plot", "", "With --what=growth: a PNG or SVG to draw; needs matplotlib.")
    cli.define_protocol()
    flags.DEFINE_float("memory_gib", 0.0, "With --what=memory: of a device; 0: what it has.", 0.0)
    flags.DEFINE_string("json", "", "Also write the figures to this file.")
    flags.DEFINE_float("stop_after_s", 0.0, "Begin no row that might end later; 0: no limit.", 0.0)
    flags.DEFINE_bool("again", False, "Measure what --json holds already, too.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
