"""A profiler trace of some steps of a training (`config.profile`), for TensorBoard and Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from absl import logging

from duc_dlc_jax import storage

FIRST, STEPS = 10, 5  # of this start: after what is compiled and filled at its beginning


class Trace:
    """Traces steps `FIRST` to `FIRST + STEPS - 1` of this start, counted from 0; "" traces nothing.

    TensorBoard's profile plugin reads the folder; Perfetto opens
    `plugins/profile/TIME/perfetto_trace.json.gz` in it. Several processes have folders of their
    own. Raises ConfigError for a folder in an object store.
    """

    def __init__(self, folder: str):
        self._folder, self._running = "", False
        if folder:
            several = jax.process_count() > 1
            own = f"process-{jax.process_index()}" if several else ""
            self._folder = str(Path(storage.local("config.profile", folder)).absolute() / own)

    def before(self, number: int) -> None:
        """To be called before step `number` of this start."""
        if self._folder and number == FIRST:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, number: int, results: Any) -> None:
        """To be called after it; results: arrays that the device has when the step is done."""
        if self._running and number == FIRST + STEPS - 1:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the steps so far, where a trace is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("profile of the steps: tensorboard --logdir=%s", self._folder)
