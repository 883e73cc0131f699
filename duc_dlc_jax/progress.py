"""How far a command is: one line that a terminal redraws, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LOG_EVERY = 30.0  # seconds between the lines of a log


class Progress:
    """One line: what is done, figures, time left; redrawn on a terminal, plain lines in a log."""

    def __init__(self, total: int, unit: str, quiet: bool = False):
        """unit: of what is counted, "step"; quiet: writes nothing."""
        self._total, self._unit, self._quiet, self._stream = total, unit, quiet, sys.stderr
        self._origin: tuple[int, float] | None = None  # after the first, which is often slow
        self._last, self._paused = 0.0, 0.0

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` of evaluation or checkpointing out of the estimate."""
        self._paused += seconds

    def show(self, done: int, text: str, log: bool) -> None:
        """Redraws a terminal at most 4 times a second; in a log writes when `log` is set."""
        now = time.monotonic()
        first, start = self._origin = self._origin or (done, now)
        line = f"{self._unit} {done}/{self._total}  {text}"
        if done > first:
            pace = (now - start - self._paused) / (done - first)
            line += f"  {clock(pace * max(self._total - done, 0))} left"
        if not self._stream.isatty():
            if log:
                self.say(line)
        elif not self._quiet and (now - self._last > 0.25 or done == self._total):
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if done == self._total else ""))
            self._stream.flush()
            self._last = now

    def say(self, text: str) -> None:
        """A line that stays, above the progress line."""
        if not self._quiet:
            self._stream.write(("\r\x1b[K" if self._stream.isatty() else "") + text + "\n")
            self._stream.flush()


def shown(items: Iterable[T], total: int, unit: str, quiet: bool = False) -> Iterator[T]:
    """The items, with the number that is done and the time left; in a log every 30 s."""
    line, last = Progress(total, unit, quiet), time.monotonic()
    for done, item in enumerate(items):
        if done:
            log = time.monotonic() - last > LOG_EVERY
            line.show(done, "", log)
            last = time.monotonic() if log else last
        yield item
    if total:
        line.show(total, "", log=False)


def clock(seconds: float) -> str:
    """Writes a duration as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
