"""Which process works on which run, so that several can share a workdir.

A run is claimed by an advisory lock (flock) on `claims/NAME.lock`, held as long as a process works
on it: a process frees its run by ending, however it ends. The file stays, and says who had it last;
without the lock it means nothing. `claims/choosing` is locked for the moment of a choice, so that
processes choose one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from absl import logging

from duc_dlc_jax.ablate.grid import Run

LOCK = ".lock"


def choose(runs: Sequence[Run], held: Collection[str], current: str) -> Run | None:
    """The next run of a process that has the programs of the variant `current` compiled.

    Of the runs that nobody works on the first one, in the order given, of `current`; else of the
    variants that nobody works on; else of all. held: names of the runs in work, also of others.
    """
    busy = {name.rpartition("-seed")[0] for name in held}
    free = [run for run in runs if run.name not in held]
    own = [run for run in free if run.variant.name == current]
    idle = [run for run in free if run.variant.name not in busy]
    return next(iter([*own, *idle, *free]), None)


class Claims:
    """The locks of a workdir's runs.

    Where the file system refuses locks one warning says so, and no run is ever claimed.
    """

    def __init__(self, folder: Path):
        self._folder, self._refused = folder, False

    def holders(self) -> dict[str, str]:
        """The runs in work, by name, and by whom: "HOST, pid 4711"."""
        if not (self._folder / "choosing").exists():
            return {}
        with open(self._folder / "choosing") as choosing:
            self._lock(choosing, fcntl.LOCK_SH)
            return self._holders()

    @contextlib.contextmanager
    def claimed(self, take: Callable[[dict[str, str]], Run | None]) -> Iterator[Run | None]:
        """What `take` returns, given the holders; the run is claimed until the end of the block."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with open(self._folder / "choosing", "a") as choosing:
                self._lock(choosing, fcntl.LOCK_EX)
                run = take(self._holders())
                if run is not None:
                    path = self._folder / (run.name + LOCK)
                    claim = stack.enter_context(open(path, "a"))
                    self._lock(claim, fcntl.LOCK_EX)
                    claim.truncate(0)
                    claim.write(f"{socket.gethostname()}, pid {os.getpid()}\n")
                    claim.flush()
                    os.fsync(claim.fileno())  # NFS: others read it while it is open
            yield run

    def _holders(self) -> dict[str, str]:
        """While nobody chooses: to look is to lock for a moment, which a claim must not meet."""
        held = {}
        for path in sorted(self._folder.glob("*" + LOCK)):
            with open(path) as claim:
                if not self._lock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB):
                    held[path.name.removesuffix(LOCK)] = claim.read().strip()
        return held

    def _lock(self, file: IO[Any], kind: int) -> bool:
        """Whether nobody else has the lock, which ends when the file is closed."""
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._refused:
                logging.warning(
                    "%s: the file system has no locks (%s); runs are not claimed, so start no "
                    "second process in this workdir",
                    self._folder,
                    error.strerror,
                )
            self._refused = True
        return True
