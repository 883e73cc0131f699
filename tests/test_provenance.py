"""What a run says about the code and the processor that it had."""

from __future__ import annotations

import subprocess

import pytest

import duc_dlc_jax
from duc_dlc_jax import provenance


@pytest.fixture(autouse=True)
def asked_anew():
    provenance.code.cache_clear()
    yield
    provenance.code.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with the package's place in it, in no checkout."""
    folder = tmp_path / "project" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(duc_dlc_jax, "__file__", str(folder / "__init__.py"))
    return folder


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_outside_of_a_checkout_there_is_a_version_alone(package):
    assert provenance.code() == {"version": duc_dlc_jax.__version__}


def test_without_git_there_is_a_version_alone(package, monkeypatch):
    monkeypatch.setenv("PATH", str(package))
    assert provenance.code() == {"version": duc_dlc_jax.__version__}


def test_a_checkout_has_its_commit_and_whether_the_package_was_changed(package):
    git(package.parent, "init", "--quiet")
    assert "commit" not in provenance.code()  # of another project: it does not hold the package
    provenance.code.cache_clear()
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "first")
    found = {"version": duc_dlc_jax.__version__, "commit": git(package, "rev-parse", "HEAD")}
    (package.parent / "page.md").write_text("beside the package")
    assert provenance.code() == found | {"dirty": False}
    (package / "__init__.py").write_text("changed = True")
    assert not provenance.code()["dirty"]  # asked once: of the code that was imported
    provenance.code.cache_clear()
    assert provenance.code() == found | {"dirty": True}


def test_the_processor_has_a_name_and_cores():
    assert provenance.cpu()
    assert provenance.usable_cores() >= 1
