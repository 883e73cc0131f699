"""Where a run's time goes: the share that was training, over all its starts."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from duc_dlc_jax import storage

PARTS = ("start", "compile", "data", "checkpoint", "evaluation")  # of one process's time


@functools.cache
def _process_start() -> float:
    """When this process began, seconds since the epoch; now, where the system does not say."""
    with contextlib.suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        after_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot)
    return time.time()


class Goodput:
    """Seconds of a run by what they went to; kept in `workdir/goodput.jsonl` by process 0.

    training    what is left of a process's time: steps that the run kept
    start       from the process's begin to its first step: imports, restoring; not compilation
    compile     the first call of the training step
    data        waiting for the next batch
    checkpoint  saving, as far as training waits for it
    evaluation  scoring the evaluation split, compilation of its programs included
    restarts    training that was done again, and the time from one process's last line to the next
                process's begin
    """

    def __init__(self, workdir: epath.Path, first_step: int, begin: float | None = None):
        """first_step: updates done so far.

        begin: seconds since the epoch; None takes the process's, or now for its second run.
        """
        second = _process_start.cache_info().currsize > 0
        self._begin = begin or (time.time() if second else _process_start())
        self._first = first_step
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._file, self._earlier = None, dict.fromkeys(("training", *PARTS, "restarts"), 0.0)
        if jax.process_index() != 0:
            return
        path = workdir / "goodput.jsonl"
        text = storage.read(path)
        self._add_earlier(storage.json_lines(text))
        self._file = storage.Lines(path)
        if text and not text.endswith("\n"):  # a killed process's last line
            self._file.write("")

    def _add_earlier(self, lines: list[dict]) -> None:
        begins = sorted({line["begin"] for line in lines})
        starts = {line["begin"]: line["first"] for line in lines} | {self._begin: self._first}
        for begin, following in zip(begins, [*begins[1:], self._begin], strict=False):
            own = [line for line in lines if line["begin"] == begin]
            kept = [line["training"] for line in own if line["step"] <= starts[following]]
            training, last = max(kept, default=0.0), own[-1]
            self._earlier["training"] += training
            for part in PARTS:
                self._earlier[part] += last[part]
            self._earlier["restarts"] += last["training"] - training
            self._earlier["restarts"] += max(following - last["time"], 0)

    def started(self) -> None:
        """The first step follows."""
        self._spent["start"] = time.time() - self._begin

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """The time inside goes to `part`."""
        begin = time.time()
        try:
            yield
        finally:
            self._spent[part] += time.time() - begin

    def line(self, step: int) -> dict[str, float]:
        """Seconds so far, over all processes of the run, and the share of training.

        Keeps them, so that the next process can count what it does again.
        """
        now = time.time()
        training = now - self._begin - sum(self._spent.values())
        own = self._spent | {"training": training}
        if self._file:
            row = {"begin": self._begin, "first": self._first, "step": step, "time": now, **own}
            self._file.write(json.dumps(row))
        total = {part: seconds + own.get(part, 0) for part, seconds in self._earlier.items()}
        share = total["training"] / sum(total.values())
        return {f"time/{part}": seconds for part, seconds in total.items()} | {"goodput": share}

    def sentence(self, step: int) -> str:
        """The figures in a line for people."""
        figures = self.line(step)
        share = figures.pop("goodput")
        parts = ", ".join(f"{n.removeprefix('time/')} {s:.0f}" for n, s in figures.items())
        return f"{100 * share:.1f}% of {sum(figures.values()):.0f} s were training ({parts})"

    def close(self) -> None:
        if self._file:
            self._file.close()
