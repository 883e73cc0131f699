"""The files of this checkout."""

import ast
import gc
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def tracked_files() -> list[pathlib.Path]:
    """Files that git has or would take: neither ignored nor deleted."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def tracked_texts() -> Iterator[tuple[pathlib.Path, str]]:
    """Their paths below ROOT, and what is in those that are text."""
    for path in tracked_files():
        try:
            yield path.relative_to(ROOT), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def parsed(source: str) -> ast.Module:
    """As `ast.parse`, without the garbage collector.

    What it finds may warn, and pytest writes the warning's traceback with `ast.parse`: inside
    another one that is a SystemError of Python 3.11.
    """
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()
