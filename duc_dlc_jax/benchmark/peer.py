"""The same network in PyTorch, in a process of its own, for alternating rounds.

The network stands in the repository's `tests/` (`torch_twin.py`, `torch_peer.py`) and not in the
package: a checkout is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.grafting import flat
from duc_dlc_jax.train_step import create_state, make_train_step

SCRIPT = pathlib.Path(__file__).parents[2] / "tests" / "torch_peer.py"
WAYS = ("eager", "compile", "eager-nchw", "compile-nchw")  # channels_last where not said
CHECKED = 256  # pixels a side of what both compute before anything is timed
LOGITS = {"float32": 1e-4, "bfloat16": 3e-2}  # allowed difference, by compute dtype
BOUNDS = {"loss": 1e-4, "gradient": 1e-2, "gradient norm": 1e-2}  # in float32, without dropout

# Fields that PyTorch's side knows with one value alone; the second part does not change labels.
NETWORK = {"model.upsampling": "duc", "model.context": "dlc"}
TRAINING = {
    "model.aux_head": False,
    "model.backbone_frozen": False,
    "model.bn_frozen": False,
    "model.bn_padding": "counted",
    "model.remat": "none",
    "loss.class_weights": (),
    "loss.class_balance": "none",
    "loss.label_smoothing": 0.0,
    "loss.ohem_threshold": 0.0,
    "optimizer.name": "sgd",
    "optimizer.multipliers": (),
    "optimizer.decay_kernels_only": False,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 0.0,
    "train.accumulate": 1,
}


def check() -> None:
    """Raises ConfigError where the repository's tests or PyTorch are missing."""
    if not SCRIPT.is_file():
        raise ConfigError(f"--peer=torch needs a checkout of the repository: no {SCRIPT}")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError('--peer=torch needs PyTorch: pip install --editable ".[torch]"')


def check_config(config: ml_collections.ConfigDict, kinds: Collection[str], devices: int) -> None:
    """Raises ConfigError for what PyTorch's side does not compute; kinds: of train and infer."""
    training = "train" in kinds
    values = dict(config_lib.fields(config))
    for name, value in (NETWORK | TRAINING if training else NETWORK).items():
        found = tuple(values[name]) if value == () else values[name]
        if found != value:
            raise ConfigError(f"--peer=torch knows {name}={value!r} alone; here it is {found!r}")
    if values["model.dtype"] not in LOGITS:
        raise ConfigError(
            f"--peer=torch: model.dtype={values['model.dtype']!r}; allowed: {', '.join(LOGITS)}"
        )
    if training and devices > 1:
        raise ConfigError(
            f"--peer=torch trains on one device, and here are {devices}: CUDA_VISIBLE_DEVICES=0"
        )


class Peer:
    """A running PyTorch process with the network of `work` (a `model.Work`).

    Attributes:
      version: PyTorch's.
      differences: relative, to our logits, and where `kinds` has "train" loss and gradient.
      peak_bytes: the most device memory that PyTorch allocated in the last call of `seconds`.
    """

    def __init__(
        self,
        work: Any,
        data: dict[str, np.ndarray],
        image: np.ndarray,
        kinds: Collection[str],
        threads: int = 0,
    ):
        """data: the training batch; image: uint8 [1, H, W, 3] of inference; threads: 0 for all.

        Raises ConfigError where something is missing, where PyTorch's process fails, and where it
        computes another function than the package.
        """
        check()
        self.peak_bytes = 0
        self._folder = tempfile.TemporaryDirectory()
        root = pathlib.Path(self._folder.name)
        (root / "config.json").write_text(config_lib.to_json(work.config))
        (root / "settings.json").write_text(json.dumps({"threads": threads}))
        variables = _moved(work.variables)
        np.savez(root / "variables.npz", **flat(variables))
        np.savez(root / "batch.npz", image=data["image"], label=data["label"], infer=image)
        np.savez(root / "expected.npz", **_expected(work, variables, data, "train" in kinds))
        self._log = open(root / "log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            said = self._answer()
            self.version, self.differences = said["torch"], said["differences"]
            self._compare({"logits": LOGITS[work.config.model.dtype]} | BOUNDS)
        except BaseException:
            self.close()
            raise

    def _compare(self, bounds: dict[str, float]) -> None:
        for name, difference in self.differences.items():
            if not difference <= bounds[name]:
                raise ConfigError(
                    f"PyTorch's {name} differs by {difference:.1e} (relative) from the package's, "
                    f"allowed {bounds[name]:.0e}: {SCRIPT} computes another function"
                )

    def prepare(self, what: str, way: str) -> str:
        """Compiles and warms up "train" or "infer" in one of WAYS; returns its form of g(I).

        Raises ConfigError where that fails, as do the others.
        """
        return self._ask({"prepare": what, "way": way})["guidance"]

    def seconds(self, steps: int) -> float:
        """Of one call of `steps` of what was prepared."""
        answer = self._ask({"steps": steps})
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def groups(self, steps: int) -> dict[str, float]:
        """{layer group: seconds} of labelling one image in eager mode, the median of `steps`."""
        return self._ask({"groups": steps})["groups"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so say the answers
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                if "error" in said:
                    raise ConfigError(f"PyTorch: {said['error']}")
                return said
        code = self._process.wait()
        self._log.seek(0)
        raise ConfigError(f"PyTorch's process ended with {code}:\n{self._log.read()[-2000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore
        self._folder.cleanup()


def _moved(variables: Any) -> Any:
    """The variables with noise in scales, biases and statistics, so that each of them matters."""
    rng = np.random.default_rng(0)

    def moved(path, leaf):
        if path[-1].key == "kernel":
            return leaf
        return (leaf + rng.uniform(0, 0.2, leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(moved, jax.device_get(variables))


def _expected(work: Any, variables: Any, data: dict[str, np.ndarray], training: bool) -> Any:
    """What PyTorch has to find in parts of up to two images; see its `Peer.differences`."""
    with jax.default_matmul_precision("highest"):
        return _computed(work, variables, data, training)


def _computed(work: Any, variables: Any, data: dict[str, np.ndarray], training: bool) -> Any:
    batch = {name: data[name][:2, :CHECKED, :CHECKED] for name in ("image", "label")}
    logits = jax.jit(work.model.apply)(variables, batch["image"][:1])
    expected = batch | {"logits": np.asarray(logits)}
    if not training:
        return expected

    def update(updates, state, params=None, **_) -> Any:
        return params, updates

    keep = optax.GradientTransformationExtraArgs(lambda params: params, update)  # as its state
    model = work.model.clone(dropout=0.0, dtype=jnp.dtype("float32"))
    state = create_state(model, keep, work.config, variables)
    state, found = jax.jit(make_train_step(model, keep, work.config))(state, batch, np.uint32(0))
    return expected | {"loss": np.asarray(found["loss"])} | flat({"gradient": state.opt_state})
