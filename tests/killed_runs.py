"""Trains one run through many kills: `python tests/killed_runs.py DATA_DIR WORKDIR TRIALS SEED`.

Each trial is a forked process that ends itself by SIGKILL: in a step, in a save, or while an old
checkpoint is being deleted. A last one trains to the end. Prints JSON: what each kill left behind.
Forks keep the imports and the traced step, so that a trial costs no more than restoring and a few
steps.
"""

import functools
import json
import logging
import os
import pathlib
import random
import re
import signal
import sys
import threading
import time

import jax  # imported before the forks, started after them
import numpy as np
import tensorflow_datasets  # noqa: F401
from clu import metric_writers  # noqa: F401
from jax.extend.core import jaxpr_as_fun

from duc_dlc_jax import checkpoints, optimizer, sharding, train, train_step
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import segmenter
from runs import SMALL, tiny_config

STEPS = 60


def trace_step(config):
    """Traces the step before the forks: in them `train` is given what was traced."""
    model = segmenter.create(config.model, label_spec("scenes").num_classes)
    step = train_step.make_train_step(model, optimizer.create(config.optimizer, STEPS), config)
    size, crop = config.train.batch_size, config.data.crop_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, crop, crop, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((size, crop, crop), np.uint8),
    }
    seed = jax.ShapeDtypeStruct((), np.uint32)
    state = train_step.state_shapes(model, config)
    traced, result = jax.make_jaxpr(step, return_shape=True)(state, batch, seed)
    structure = jax.tree.structure(result)

    def again(*args):
        return structure.unflatten(jaxpr_as_fun(traced)(*jax.tree.leaves(args)))

    train.make_train_step = lambda *_: again


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(generator):
    """Some time after the start of a step, which the device may or may not have done."""
    original, countdown = sharding.jit_train_step, generator.randint(3, 8)
    delay = generator.uniform(0, 0.05)

    def jit(*args):
        step = original(*args)

        def counted(state, batch, seed):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                threading.Timer(delay, die).start()
            return step(state, batch, seed)

        return counted

    sharding.jit_train_step = jit


def kill_in_save(generator, folder):
    """As soon as a save under way has written some number of files."""
    original, countdown = checkpoints.Checkpoints.save, generator.randint(2, 3)
    files = generator.randint(0, 12)

    def watch():
        while True:
            written = [p for p in folder.glob("*tmp*/**/*") if p.is_file()]
            if len(written) >= files and any(folder.glob("*tmp*")):
                die()

    @functools.wraps(original)
    def save(self, *args):
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            threading.Thread(target=watch, daemon=True).start()
        return original(self, *args)

    checkpoints.Checkpoints.save = save


def kill_in_delete(generator, folder):
    """When some number of files of an old checkpoint are gone."""
    original, countdown = os.unlink, generator.randint(1, 12)

    def unlink(path, *args, dir_fd=None, **kwargs):
        nonlocal countdown
        original(path, *args, dir_fd=dir_fd, **kwargs)
        where = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else str(path)
        if re.match(rf"{folder}/\d+(/|$)", where):
            countdown -= 1
            if countdown == 0:
                die()

    os.unlink = unlink


def trial(config, workdir, kind, generator) -> str:
    """Runs and kills; returns what it was killed in, or "finished"."""
    folder = workdir / "checkpoints"
    pid = os.fork()
    if pid == 0:
        logging.getLogger().setLevel(logging.ERROR)
        arm = {"step": kill_in_step, "save": kill_in_save, "delete": kill_in_delete, "": None}[kind]
        if arm:
            arm(generator, *[folder] * (kind != "step"))
        train.train(config, workdir)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, f"a {kind} trial ended with an error"
        return "finished"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return kind


def left_behind(folder) -> dict:
    steps = {
        int(p.name): sum(f.is_file() for f in p.rglob("*"))
        for p in folder.glob("[0-9]*")
        if p.name.isdigit()
    }
    return {"unfinished": len(list(folder.glob("*tmp*"))), "files": steps}


def main():
    data_dir, workdir, trials, seed = sys.argv[1:]
    workdir, generator = pathlib.Path(workdir), random.Random(int(seed))
    changes = {"train__steps": STEPS, "train__log_every": 10, "eval__pictures": 0}
    changes |= {"data__scale_min": 0.75, "data__scale_max": 1.5}  # as configs/demo.py
    config = tiny_config(data_dir, **SMALL | changes, optimizer__ema_decay=0.9)
    trace_step(config)
    kinds = ["step", "save", "delete", "save"] * (int(trials) // 4)
    results = []
    for kind in kinds:
        start = time.monotonic()
        ended = trial(config, workdir, kind, generator)
        results.append({"kind": ended, **left_behind(workdir / "checkpoints")})
        results[-1]["seconds"] = round(time.monotonic() - start, 1)
        print(results[-1], file=sys.stderr, flush=True)
    ended = trial(config, workdir, "", generator)
    print(json.dumps({"trials": results, "end": ended}))


if __name__ == "__main__":
    main()
