"""Being told to stop, by SIGTERM or Ctrl-C, becomes a checkpoint at a step that all agree on."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils

from duc_dlc_jax.errors import STOP_SIGNALS, Stopped

T = TypeVar("T")


class StopSignal:
    """Whether to stop, asked at the same points in every process.

    `errors.STOP_SIGNALS` only set a flag, so that they are not lost during compilation either; a
    second Ctrl-C (SIGINT) is Python's KeyboardInterrupt. With several processes JAX's coordination
    service passes one process's SIGTERM, which the other signals become, on and picks the point at
    which all of them stop; it takes part in the step that each has reached, so `reached` must be
    called equally often everywhere.
    """

    def __init__(self):
        self.signal = "SIGTERM"  # the one that came
        self._asked, self._calls = False, 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the context lasts; outside the main thread nothing is taken.

        What the process was started to ignore, as by nohup or a shell's background, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = {n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        if jax.process_count() > 1:  # JAX has a handler of its own, since its start
            taken.discard(signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self._asked, self.signal = True, signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        logging.warning("%s: saving a checkpoint after this step", self.signal)

    def reached(self) -> bool:
        """True where the run must stop now; the same in every process."""
        self._calls += 1
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def watched(self, items: Iterable[T], count: int) -> Iterator[T]:
        """The items, raising Stopped between two of them where `reached` says so.

        count: at least as many as any process has items, and the same in every process.
        """
        iterator = iter(items)
        for _ in range(count):
            if self.reached():
                raise Stopped
            yield from itertools.islice(iterator, 1)
