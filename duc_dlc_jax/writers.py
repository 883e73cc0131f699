"""Where figures and pictures go: JSON lines in the workdir, TensorBoard and the log through CLU."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from duc_dlc_jax import storage
from duc_dlc_jax.errors import NotFinite

EVENTS_BYTES = 2**22


class Writer:
    """Scalars to `metrics.jsonl`; with pictures and texts to TensorBoard by CLU's SummaryWriter.

    Process 0 writes; the others do nothing. CLU's writers need TensorFlow (imported here and not
    before): without it the JSON lines remain, after one warning. In an object store both are
    uploaded by `flush`.
    """

    def __init__(self, workdir: epath.Path, first_step: int):
        """first_step: updates done so far; lines of later steps, which will be redone, go."""
        self._lines, self._events = None, None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        old = storage.json_lines(storage.read(path))
        kept = [json.dumps(values) for values in old if values["step"] <= first_step]
        self._lines = storage.Lines(path, kept)
        try:
            self._events = _Events(workdir)
        except ImportError as error:
            logging.warning("no TensorBoard events, only metrics.jsonl: %s", error)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name; NaN and infinity are null in the JSON line."""
        values = {name: float(value) for name, value in values.items()}
        if self._lines:
            finite = {n: v if np.isfinite(v) else None for n, v in values.items()}
            self._lines.write(json.dumps({"step": step, **finite}))
        if self._events:
            self._events.writer.write_scalars(step, values)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """uint8 RGB [N, H, W, 3] by name."""
        if self._events:
            self._events.writer.write_images(step, images)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        if self._events:
            self._events.writer.write_texts(step, texts)

    def flush(self) -> None:
        if self._lines:
            self._lines.flush()
        if self._events:
            self._events.flush()

    def close(self) -> None:
        if self._lines:
            self._lines.close()
        if self._events:
            self._events.close()


class _Events:
    """TensorBoard's events in the workdir; of an object store in a folder here, and uploaded.

    TensorFlow, which writes them, knows no `s3://`. An object is replaced as a whole, so a file
    beyond `EVENTS_BYTES` is followed by another one. Raises ImportError without TensorFlow.
    """

    def __init__(self, workdir: epath.Path):
        from clu import metric_writers

        self._workdir, self._folder, self._uploaded = workdir, None, {}
        if storage.is_remote(workdir):
            self._folder = tempfile.TemporaryDirectory(prefix="duc_dlc_jax-events-")
        folder = self._folder.name if self._folder else str(workdir)
        self._begin = functools.partial(metric_writers.SummaryWriter, folder)
        self.writer = self._begin()

    def flush(self) -> None:
        self.writer.flush()
        if self._folder and self._upload():
            self.writer.close()
            self._upload()
            self.writer = self._begin()

    def _upload(self) -> bool:
        """Uploads what has grown; returns whether something that has is large."""
        large = False
        for path in epath.Path(self._folder.name).iterdir() if self._folder else ():
            size = path.stat().length
            if self._uploaded.get(path.name) != size:
                try:
                    (self._workdir / path.name).write_bytes(path.read_bytes())
                    self._uploaded[path.name] = size
                    large |= size > EVENTS_BYTES
                except storage.errors() as error:
                    logging.warning("TensorBoard's events cannot be uploaded: %s", error)
        return large

    def close(self) -> None:
        self.writer.close()
        self._upload()
        if self._folder:
            self._folder.cleanup()


class StepFigures:
    """Figures of the steps since the last log line; keeps at most two steps in flight.

    The first step, which compiles, counts in the means and not in the time.
    """

    def __init__(self, batch_size: int, name: Callable[[int], str] = str):
        """name: of a record, for errors."""
        self._batch_size, self._name = batch_size, name
        self._metrics: list[dict[str, jax.Array]] = []
        self._records: list[np.ndarray] = []
        self._in_flight: deque[jax.Array] = deque()
        self.text, self._compiled = "", False
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, so that evaluations and checkpoints do not count as training."""
        self._start, self._waited, self._steps = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is time spent waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def add(self, metrics: dict[str, jax.Array], records: np.ndarray) -> None:
        """records: int [b], those of the batch that this process read."""
        self._metrics.append(metrics)
        self._records.append(records)
        self._steps += 1
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > 2:
            done = self._in_flight.popleft()
            self.text = f"loss {float(done):.4f}  {self._rate():.1f} images/s"
        if not self._compiled:
            jax.block_until_ready(metrics)
            self._compiled = True
            self.restart()

    def _rate(self) -> float:
        return self._steps * self._batch_size / max(time.monotonic() - self._start, 1e-9)

    def take(self, step: int) -> dict[str, float]:
        """Means over the window, and rate and share of waiting of its steps that were timed.

        Raises NotFinite as `check_finite`.
        """
        self.check_finite(step)
        rows = jax.device_get(self._metrics)
        elapsed = max(time.monotonic() - self._start, 1e-9)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        self.text = f"loss {means['loss']:.4f}"
        if self._steps:
            rate, waited = self._rate(), self._waited / elapsed
            means |= {"images_per_second": rate, "data_wait_share": waited}
            self.text += f"  {rate:.1f} images/s  {100 * waited:.0f}% waiting for data"
        self._metrics.clear()
        self._records.clear()
        self.restart()
        return means

    def check_finite(self, step: int) -> None:
        """Raises NotFinite, before a step counts that was none.

        step: the last one that was added.
        """
        for i, row in enumerate(jax.device_get(self._metrics)):
            if not np.isfinite(row["loss"]) or not np.isfinite(row["grad_norm"]):
                names = ", ".join(self._name(int(record)) for record in self._records[i])
                raise NotFinite(
                    f"loss {row['loss']}, gradient norm {row['grad_norm']} in step "
                    f"{step - len(self._metrics) + 1 + i}, which was not taken and not saved. Its "
                    f"batch (this process's part): {names}. Lower optimizer.learning_rate or set "
                    "optimizer.clip_norm; the same command goes on from the last checkpoint"
                )
