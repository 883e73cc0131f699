"""Being told to stop: SIGTERM becomes a checkpoint at a step that all processes agree on."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils

from duc_dlc_jax.errors import Stopped

T = TypeVar("T")


class StopSignal:
    """Whether to stop, asked at the same points in every process.

    SIGTERM only sets a flag, so that it is not lost during compilation either. With several
    processes JAX's coordination service passes one process's SIGTERM on and picks the point at
    which all of them stop; it takes part in the step that each has reached, so `reached` must be
    called equally often everywhere.
    """

    def __init__(self):
        self._asked, self._calls = False, 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM while the context lasts; outside the main thread nothing is taken."""
        alone = jax.process_count() == 1  # else JAX's own handler, there since its start
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, *_) -> None:
        self._asked = True
        logging.warning("SIGTERM: saving a checkpoint after this step")

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
