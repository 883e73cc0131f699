"""What a figure comes from: the code that ran, and the processor beneath it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import duc_dlc_jax


@functools.cache
def code() -> dict[str, Any]:
    """The package's version; in a checkout also its commit, and whether its files differ from it.

    Asked once, as close to the import of the modules as the caller is.
    """
    found: dict[str, Any] = {"version": duc_dlc_jax.__version__}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git; no checkout
        _git("ls-files", "--error-unmatch", "__init__.py")  # else the checkout is another project's
        found["commit"] = _git("rev-parse", "HEAD").strip()
        found["dirty"] = bool(_git("status", "--porcelain", "--", "."))
    return found


def _git(*words: str) -> str:
    folder = str(Path(duc_dlc_jax.__file__).parent)
    command = ["git", "-C", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def sources() -> str:
    """SHA-256 of the package's Python files, for results that are kept until the code changes."""
    folder, digest = Path(duc_dlc_jax.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def version(package: str) -> str:
    """Of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError, StopIteration):  # Linux says more than Python
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
