"""The same network in PyTorch, in a process of its own, for alternating rounds.

The network stands in the repository's `tests/` (`torch_twin.py`, `torch_peer.py`) and not in the
package: a checkout is needed.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError

SCRIPT = pathlib.Path(__file__).parents[2] / "tests" / "torch_peer.py"


def check() -> None:
    """Raises ConfigError where the repository's tests are not there."""
    if not SCRIPT.is_file():
        raise ConfigError(f"--peer=torch needs a checkout of the repository: no {SCRIPT}")


def layer_seconds(shapes: Any, batch: int, dtype: str, steps: int) -> list[dict[str, float]]:
    """Seconds of PyTorch's forward, input gradient and weight gradient of each convolution."""
    check()
    settings = {"shapes": shapes, "batch": batch, "half": dtype == "bfloat16", "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, str(SCRIPT), folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"PyTorch's process ended:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Peer:
    """A running PyTorch process with the network of `work` (a `model.Work`).

    Attributes:
      difference: of the logits of one crop, ||theirs - ours|| / ||ours||.
      failed: ways that raised, with what they raised.
      peak_bytes: the most device memory that PyTorch allocated, of the last way timed.
    """

    def __init__(
        self, work: Any, data: dict[str, np.ndarray], image: np.ndarray, ways: Any, threads: int
    ):
        """data: the training batch; image: uint8 [1, H, W, 3] of inference.

        Raises ConfigError where the repository's `tests` or PyTorch is missing.
        """
        check()
        self._asked = ways
        self._folder = tempfile.TemporaryDirectory()
        self.failed: dict[str, str] = {}
        self.peak_bytes = None
        root = pathlib.Path(self._folder.name)
        (root / "config.json").write_text(config_lib.to_json(work.config))
        (root / "settings.json").write_text(json.dumps({"threads": threads}))
        flat: Any = traverse_util.flatten_dict(jax.device_get(work.variables), sep="/")
        np.savez(root / "variables.npz", **flat)
        np.savez(root / "batch.npz", image=data["image"], label=data["label"], infer=image)
        self._log = open(root / "log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.version = self._answer()["ready"]
        ours = work.model.apply(work.variables, data["image"][:1])
        ours, theirs = np.asarray(ours), np.load(root / "torch_logits.npy")
        self.difference = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
        self._ways: dict[str, list[str]] = {}

    def warm_up(self, kinds: Any) -> None:
        """Starts what `ways` does beside what the caller does, which compiles too."""
        kinds = [what for what in ("train", "infer") if what in kinds]
        self._warming = threading.Thread(target=lambda: [self._warmed(what) for what in kinds])
        self._warming.start()

    def ways(self, what: str) -> list[str]:
        """The ways that can be timed, warmed up: those asked for that do not fail."""
        self._warming.join()
        return self._ways[what]

    def _warmed(self, what: str) -> None:
        found = [way for way in self._asked if self.seconds(what, way, 1) > 0]
        self._ways[what] = [way for way in found if self.seconds(what, way, 3) > 0]

    def seconds(self, what: str, way: str, steps: int) -> float:
        """Of one call of `steps`; -1 where this way raised."""
        answer = self._ask({"what": what, "way": way, "steps": steps})
        if "error" in answer:
            self.failed[f"{what}, {way}"] = answer["error"]
            return -1.0
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def groups(self, steps: int) -> dict[str, float]:
        """{layer group: seconds} of labelling one image in eager mode, the median of `steps`."""
        return self._ask({"what": "groups", "steps": steps})["groups"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        raise ConfigError(f"PyTorch's process ended:\n{self._log.read()[-2000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()
