"""Which record a process was reading when it died."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

from duc_dlc_jax.errors import STOP_SIGNALS


class InFlight:
    """A note per process and thread of the record in its hands, kept as files in memory.

    Pickles as the folder of the notes, so that worker processes write where their parent reads. A
    process that unpickles it is such a worker, and ends when its parent is gone.
    """

    def __init__(self):
        shared = pathlib.Path("/dev/shm")
        self._owner = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)
        self._folder = pathlib.Path(self._owner.name)
        # Python's helper process for shared memory must outlive them too; it inherits the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __getstate__(self) -> dict:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if threading.current_thread() is threading.main_thread():
            # A cluster sends them to every process of a job, and so does a terminal; the trainer
            # still needs batches.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    @contextlib.contextmanager
    def reading(self, record: int) -> Iterator[None]:
        """Notes `record` while the context lasts; only a process that dies leaves its note."""
        note = self._folder / f"{os.getpid()}-{threading.get_ident()}"
        note.write_text(str(record))
        try:
            yield
        finally:
            note.unlink(missing_ok=True)

    def left_behind(self) -> list[int]:
        """Returns the records that processes which are gone had in their hands, ascending."""
        notes = [note for note in self._folder.iterdir() if not _alive(note.name.split("-")[0])]
        return sorted({int(text) for note in notes if (text := note.read_text())})


def _end_with(parent: int) -> None:
    """Ends this process when `parent` is no longer its parent: a killed trainer ends nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True
