"""Shared fixtures."""

import os
import pathlib
import signal
from types import SimpleNamespace

import pytest

from duc_dlc_jax.errors import STOP_SIGNALS
from networks import QUICK
from runs import tiny_config

# Most of the tests' time is compilation: of this process and of those that it starts.
_FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> pathlib.Path:
    """A data_dir with the drawn scenes prepared: 200 train and 40 val images of 192x256."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("scenes", None, folder)
    return folder


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory) -> pathlib.Path:
    """As `scenes_dir` with 40 train and 8 val images, for runs that are evaluated in passing."""
    pytest.importorskip("tensorflow", reason="preparing records needs TensorFlow")
    from duc_dlc_jax.data.builders import scenes
    from duc_dlc_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        for split, count in {"train": 40, "val": 8}.items():
            patch.setitem(scenes.COUNTS, split, count)
        prepare("scenes", None, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def stoppable():
    """What a shell's background and nohup ignore is handed on to children, whose tests send it."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.fixture(scope="session", autouse=True)
def strict_rank_promotion():
    """Arrays of different rank never broadcast silently, in our code or in the tests."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def bfloat16_run(strict_rank_promotion):
    """Ten steps of a tiny bfloat16 network with EMA: `config` and 11 `states` on the host.

    loss: of the compiled step, from the first state, with a `step` and a `seed`.
    """
    import jax
    import numpy as np

    from duc_dlc_jax import optimizer, train_step
    from duc_dlc_jax.models import segmenter
    from networks import QUICK, random_variables

    config = tiny_config("", model__dtype="bfloat16", optimizer__ema_decay=0.8)
    model = segmenter.create(config.model, 5)
    rule = optimizer.create(config.optimizer, 10)
    state = train_step.create_state(model, rule, config, random_variables(model))
    step = jax.jit(train_step.make_train_step(model, rule, config), compiler_options=QUICK)
    rng = np.random.default_rng(0)
    states = [jax.device_get(state)]
    for _ in range(10):
        image = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
        label = rng.integers(0, 5, (2, 64, 64)).astype(np.uint8)
        state, _ = step(state, {"image": image, "label": label}, config.seed)
        states.append(jax.device_get(state))
    batch = {"image": image, "label": label}

    def loss(of_step, seed):
        return float(step(states[0].replace(step=np.int32(of_step)), batch, seed)[1]["loss"])

    return SimpleNamespace(config=config, states=states, loss=loss)
