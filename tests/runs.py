"""Tiny runs for tests: the same modules on 64-pixel crops, in this process or as a command."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from duc_dlc_jax import config as config_lib

WITHOUT_TENSORFLOW = Path(__file__).parent / "without_tensorflow"
TINY = {
    "data.name": "scenes",
    "data.base_size": 96,
    "data.crop_size": 64,
    "model.depth": 14,
    "model.width": 8,
    "model.duc_width": 16,
    "model.guidance_width": 8,
    "model.dlc_width": 16,
    "model.dlc_growth": 8,
    "optimizer.learning_rate": 1e-2,
    "optimizer.new_layer_multiplier": 2.0,
    "train.batch_size": 4,
    "train.steps": 6,
    "train.log_every": 2,
    "train.checkpoint_every": 2,
    "eval.batch_size": 8,
    "eval.pictures": 1,
}
# Changes of TINY where a test is about processes, signals and files: half to trace and compile.
SMALL = {"model__context": "none", "model__upsampling": "bilinear", "eval__batch_size": 1}


def tiny_config(data_dir, **changes):
    """`config.default()` with TINY and `changes` ("train__steps" for train.steps)."""
    config = config_lib.default()
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(values | {"data.dir": str(data_dir)})
    return config


def command(data_dir, workdir, *extra: str, module="main", python=sys.executable, **changes):
    """The command line of a tiny training run."""
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    fields = [f"--config.{name}={value}" for name, value in values.items()]
    return [
        python,
        "-m",
        f"duc_dlc_jax.{module}",
        "--config=configs/demo.py",
        f"--workdir={workdir}",
        f"--config.data.dir={data_dir}",
        *fields,
        *extra,
    ]


def grid_file(path: Path, data_dir: Path, variants: str, **changes) -> Path:
    """A configuration of `ablate`: tiny runs; variants: the source text of their list."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    fields = TINY | {"data.dir": str(data_dir)} | changes
    path.write_text(
        "from duc_dlc_jax import config as base\n"
        "from duc_dlc_jax.ablate.grid import Variant, parts\n\n\n"
        "def get_config():\n    config = base.default()\n"
        f"    config.update_from_flattened_dict({fields!r})\n    return config\n\n\n"
        f"def get_variants():\n    return {variants}\n"
    )
    return path


def run(arguments, *, check=True, timeout=900, **env):
    """Runs a command in `environment(**env)`; its output is in the error when it fails."""
    result = subprocess.run(
        arguments, env=environment(**env), capture_output=True, text=True, timeout=timeout
    )
    if check and result.returncode:
        raise AssertionError(
            f"{arguments} ended with {result.returncode}:\n{result.stderr[-4000:]}"
        )
    return result


def run_two(data_dir, workdir, **changes) -> None:
    """The run in two processes of two devices each; both have to end with code 0."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                data_dir,
                workdir,
                f"--coordinator=localhost:{port}",
                "--processes=2",
                f"--process={index}",
                **changes,
            ),
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def environment(devices=1, tensorflow=False, **extra):
    """Variables of a process with `devices` CPU devices.

    tensorflow: whether it finds TensorFlow. Without it a run writes no TensorBoard events, and
    starts in half the time.
    """
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if not tensorflow:
        folders = [str(WITHOUT_TENSORFLOW), os.environ.get("PYTHONPATH", "")]
        own["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return os.environ | own | extra


def untrained_workdir(folder: Path, fields: dict, data: str = "scenes", change=None) -> Path:
    """What training leaves, of a network with drawn weights; fields: of config.model.

    change: from {params, batch_stats} and the configuration to other ones.
    """
    from duc_dlc_jax import optimizer, train_step, workdirs
    from duc_dlc_jax.data.labels import label_spec
    from duc_dlc_jax.models import segmenter
    from networks import random_variables

    config = config_lib.default()
    config.data.update({"name": data, "dir": str(folder / "nothing")})
    config.model.update(fields)
    spec = label_spec(data)
    model = segmenter.create(config.model, spec.num_classes)
    variables = random_variables(model)
    variables = change(variables, config) if change else variables
    rule = optimizer.create(config.optimizer, 10)
    state = train_step.create_state(model, rule, config, variables)
    workdirs.create(folder, config, spec, state)
    return folder


def free_port() -> int:
    """A port below those that Linux gives to outgoing connections: it stays free for a restart."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", port))
            return port


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of the train state saved at `step`, by path."""
    import jax
    import orbax.checkpoint as ocp

    path = Path(workdir).absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        state = reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
