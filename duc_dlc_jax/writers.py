"""Where figures and pictures go: JSON lines in the workdir, TensorBoard and the log through CLU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging


class Writer:
    """Scalars to `metrics.jsonl` and, with pictures and texts, to TensorBoard by CLU's SummaryWriter.

    Process 0 writes; the others do nothing. CLU's writers need TensorFlow (imported here and not
    before): without it the JSON lines remain, after one warning.
    """

    def __init__(self, workdir: Path):
        self._lines, self._events = None, None
        if jax.process_index() != 0:
            return
        self._lines = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        try:
            from clu import metric_writers

            self._events = metric_writers.SummaryWriter(str(workdir))
        except ImportError as error:
            logging.warning("no TensorBoard events, only metrics.jsonl: %s", error)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name; NaN and infinity are null in the JSON line."""
        values = {name: float(value) for name, value in values.items()}
        if self._lines:
            finite = {n: v if np.isfinite(v) else None for n, v in values.items()}
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._lines.flush()
        if self._events:
            self._events.write_scalars(step, values)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """uint8 RGB [N, H, W, 3] by name."""
        if self._events:
            self._events.write_images(step, images)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        if self._events:
            self._events.write_texts(step, texts)

    def flush(self) -> None:
        if self._events:
            self._events.flush()

    def close(self) -> None:
        self.flush()
        if self._lines:
            self._lines.close()
        if self._events:
            self._events.close()


class Progress:
    """One line: step, loss, rate and time left; redrawn on a terminal, plain lines in a log."""

    def __init__(self, first_step: int, steps: int, stream=sys.stderr):
        self._first, self._steps, self._stream = first_step, steps, stream
        self._start, self._last, self._paused = time.monotonic(), 0.0, 0.0

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` of evaluation or checkpointing out of the estimate."""
        self._paused += seconds

    def show(self, step: int, text: str, log: bool) -> None:
        """Redraws a terminal at most 4 times a second; in a log writes when `log` is set."""
        now = time.monotonic()
        spent = now - self._start - self._paused
        left = spent / max(step - self._first, 1) * (self._steps - step)
        line = f"step {step}/{self._steps}  {text}  {_clock(left)} left"
        if self._stream.isatty():
            if now - self._last > 0.25 or step == self._steps:
                self._stream.write(f"\r\x1b[K{line}")
                self._last = now
        elif log:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line that stays, above the progress line."""
        self._stream.write(("\r\x1b[K" if self._stream.isatty() else "") + text + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
