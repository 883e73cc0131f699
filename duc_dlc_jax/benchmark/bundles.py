"""`python -m duc_dlc_jax.benchmark.bundles --model=BUNDLE`: seconds an image, runtime by runtime.

Each runtime labels random uint8 images, one at a time, in a process of its own on the same
--threads cores; rounds go through all of them in turn, so that what else runs on the machine falls
on each. With --workdir, the run that the bundle is of, PyTorch's eager mode does the same network
(`peer.py`; needs a checkout). Prints each call, the machine's load, and the medians in Markdown;
--json has the calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

from duc_dlc_jax import cli, markdown
from duc_dlc_jax.benchmark.figures import Figures
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.export import bundle as bundles
from duc_dlc_jax.export import runtimes

NAMES = {
    "stablehlo": "StableHLO, XLA",
    "onnx": "ONNX, ONNX Runtime",
    "openvino": "ONNX, OpenVINO",
    "torch": "PyTorch, eager",
}


def seconds(path: str, form: str, size: tuple[int, int], threads: int, calls: int) -> list[float]:
    """Of each of `calls` calls after one that warms up, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    infer = runtimes.load(bundles.read(path), form, threads)
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    infer(image)
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        infer(image)
        taken.append(time.perf_counter() - start)
    return taken


def apart(path: str, form: str, size: tuple[int, int], threads: int, calls: int) -> list[float]:
    """`seconds` in a process of its own. Raises ConfigError where it fails."""
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark.bundles", f"--model={path}"]
    command += [f"--only={form}", f"--sizes={size[0]}x{size[1]}"]
    command += [f"--threads={threads}", f"--calls={calls}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{form}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def torch_peer(workdir: str, size: tuple[int, int], threads: int) -> Any:
    """A PyTorch process with the run's network; see `peer.Peer`."""
    from duc_dlc_jax import workdirs
    from duc_dlc_jax.benchmark.peer import Peer, check_config

    run = workdirs.load(workdir)
    check_config(run.config, ["infer"], 1)
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    data = {"image": image[:, :64, :64], "label": np.zeros((1, 64, 64), np.uint8)}
    work = SimpleNamespace(config=run.config, variables=run.variables, model=run.model)
    return Peer(work, data, image, ["infer"], threads)


def measure(
    args: Any, size: tuple[int, int], forms: list[str], figures: Figures
) -> dict[str, list[float]]:
    """Seconds of every call, by runtime, over all rounds; in the JSON after each process."""
    taken: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(args.rounds):
        for form in forms:
            load = os.getloadavg()[0]
            if form == "torch":
                peer = torch_peer(args.workdir, size, args.threads)
                peer.prepare("infer", "eager")
                new = [peer.seconds(1) for _ in range(args.calls)]
                peer.close()
            else:
                new = apart(args.model, form, size, args.threads, args.calls)
            taken[form] += new
            figures.keep(("seconds", "{}x{}".format(*size)), taken)
            shown = " ".join(f"{second:.3f}" for second in new)
            print(f"round {number + 1}, {form}: {shown} s (load before: {load:.1f})", flush=True)
    return taken


def main(_) -> None:
    args = flags.FLAGS
    sizes = [cli.parsed_size("sizes", text) for text in args.sizes]
    if args.only:
        print(json.dumps(seconds(args.model, args.only, sizes[0], args.threads, args.calls)))
        return
    bundle = bundles.read(args.model)
    forms = [form for form in runtimes.FORMS if form.replace("openvino", "onnx") in bundle.formats]
    forms += ["torch"] if args.workdir else []
    figures = Figures(args.json)
    figures.update({"dtype": bundle.manifest["dtype"], "threads": args.threads})
    columns = {size: measure(args, size, forms, figures) for size in sizes}
    heads = [f"{height}x{width}" for height, width in sizes]
    rows = [
        [NAMES[form], *(f"{np.median(columns[size][form]):.3f} s" for size in sizes)]
        for form in forms
    ]
    print("\n" + markdown.table([bundle.manifest["dtype"], *heads], rows))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A bundle.", required=True)
    flags.DEFINE_string("workdir", "", "The run that it is of: with PyTorch's eager mode.")
    flags.DEFINE_list("sizes", ["360x480", "1024x2048"], "HEIGHTxWIDTH in pixels.")
    flags.DEFINE_integer("threads", 2, "Cores that each runtime gets.")
    flags.DEFINE_integer("rounds", 3, "Processes of each runtime.")
    flags.DEFINE_integer("calls", 3, "Timed images in each process.")
    flags.DEFINE_string("json", "", "Also write the seconds of each call to this file.")
    flags.DEFINE_string("only", "", "Time this runtime, in this process.")
    cli.run(main)
