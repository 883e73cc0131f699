"""Ends of a run that have an exit code of their own; `cli.EXIT_CODES` has all of them."""

import signal

# What ends a run by `Stopped`: a cluster's SIGTERM, Ctrl-C, Slurm's --signal=USR1 of many sites, a
# terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or read; the message says which and what to do."""


class NotFinite(FloatingPointError):
    """A loss or a gradient that is no number; the message names the batch."""


class Stopped(Exception):
    """The run was told to stop and has saved its state; the same command goes on from there."""


class MissingProcesses(RuntimeError):
    """Some processes of the run did not arrive; the message names them."""


class NotEqual(AssertionError):
    """A resumed run that is not what the uninterrupted one is; the message says where."""
