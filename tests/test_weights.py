"""Weights by name: download, verification, cache; against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import file_server
from duc_dlc_jax import config as config_lib
from duc_dlc_jax import plans
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.models import pretrained, weights
from weight_files import check, file_tensors, model_config, shapes

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 5)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with file_server.serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DUC_DLC_CACHE", str(folder))
    return folder


@pytest.fixture
def offer(server, monkeypatch):
    """offer(file, content, sha256): the name "tiny" stands for this file."""

    def add(file="tiny-x.npz", content=CONTENT, sha256=DIGEST[:8], **fields):
        server.files[file] = content
        entry = weights.Weights(server.url(file), sha256, "torchvision", "us", "none", **fields)
        monkeypatch.setitem(weights.TABLE, "tiny", entry)
        return entry

    return add


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("fault", ["", "redirect"])
def test_a_name_is_downloaded_once(server, offer, cache, fault, capfd):
    entry, server.fault = offer(), fault
    path, source = weights.find("tiny")
    assert (path, source) == (cache / "tiny-x.npz", "torchvision")
    assert path.read_bytes() == CONTENT
    assert weights.find("tiny", "torchvision")[0] == path
    assert server.requests["tiny-x.npz"] == 1
    assert names(cache) == ["tiny-x.npz"]
    shown = capfd.readouterr().err
    assert f"downloading tiny from {entry.url}" in shown
    assert "MiB 4/4" in shown


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", r"ended after 1572866 of 3145733 bytes"),
        ("altered", rf"SHA-256 begins with (?!{DIGEST[:8]})\w{{8}}, not {DIGEST[:8]}.*Nothing"),
    ],
)
def test_what_is_not_the_file_is_not_kept(server, offer, cache, fault, message):
    offer()
    server.fault = fault
    with pytest.raises(ConfigError, match=message):
        weights.find("tiny")
    assert names(cache) == []
    server.fault = ""
    weights.find("tiny")
    assert names(cache) == ["tiny-x.npz"]


def test_a_missing_file_says_what_to_do(server, offer, cache):
    entry = offer()
    server.files.clear()
    with pytest.raises(ConfigError, match="404") as error:
        weights.find("tiny")
    assert f"Fetch {entry.url} on a machine with network" in str(error.value)
    assert f"copy it to {cache / 'tiny-x.npz'}" in str(error.value)


def test_without_network_a_copied_file_does(offer, cache, monkeypatch):
    entry = offer()
    nowhere = "http://127.0.0.1:9/tiny-x.npz"  # the discard port: nobody listens
    monkeypatch.setitem(
        weights.TABLE, "tiny", weights.Weights(nowhere, DIGEST, "torchvision", "us", "none")
    )
    with pytest.raises(ConfigError, match=rf"cannot be downloaded.*Fetch {nowhere}.*copy it to"):
        weights.find("tiny")
    assert names(cache) == []
    (cache / entry.file).write_bytes(CONTENT[:-1])
    with pytest.raises(ConfigError, match=r"or a part of it.*Delete it"):
        weights.find("tiny")
    (cache / entry.file).write_bytes(CONTENT)
    assert weights.find("tiny")[0].read_bytes() == CONTENT


def test_an_unwritable_cache_is_named(offer, tmp_path, monkeypatch):
    offer()
    (tmp_path / "file").touch()
    monkeypatch.setenv("DUC_DLC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="Set DUC_DLC_CACHE"):
        weights.find("tiny")


def test_processes_of_a_host_download_once(server, offer, cache):
    """Two processes at once: one downloads, the other waits for it."""
    entry = offer()
    server.fault = "slow"
    program = f"""
from duc_dlc_jax.models import weights
weights.TABLE["tiny"] = weights.Weights({entry.url!r}, {DIGEST!r}, "torchvision", "us", "none")
print(weights.find("tiny")[0].stat().st_size)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=600)[0] for process in started] == [f"{len(CONTENT)}\n"] * 2
    assert server.requests["tiny-x.npz"] == 1
    assert names(cache) == ["tiny-x.npz"]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("resnet51", "", r"Did you mean resnet50\?"),
        ("resnet50", "keras_v1", "comes from torchvision"),
        ("something", "", "Names: resnet50,"),
    ],
)
def test_wrong_names(cache, name, source, message):
    with pytest.raises(ConfigError, match=message):
        weights.find(name, source)


def test_the_table():
    for name, entry in weights.TABLE.items():
        assert entry.url.startswith("https://"), name
        assert entry.source in pretrained.SOURCES
        assert 8 <= len(entry.sha256) <= 64
        assert int(entry.sha256, 16) >= 0
        assert entry.file.endswith(f"-{entry.sha256[:8]}.pth"), name
        assert entry.licence
        assert weights.find(f"folder/{name}") == (weights.Path("folder", name), "")


def test_the_document_lists_the_table():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "conversion.md").read_text()
    for name, entry in weights.TABLE.items():
        known = "all 64 digits" if len(entry.sha256) == 64 else "8 digits"
        row = f"| `{name}` | {entry.file} | {entry.owner} | {entry.licence} | {entry.data} |"
        assert f"{row} {known} |\n" in text
    for source, entry in pretrained.SOURCES.items():
        assert re.search(rf"\| `{source}` \|.*\| `{entry.stride_on}` \| 1e-5 \|", text), source


def test_training_takes_a_name(offer, cache, tmp_path):
    """config.init.weights=tiny gives the backbone, and fit plans with it."""
    tensors = file_tensors()
    np.savez(tmp_path / "tiny.npz", **tensors)
    content = (tmp_path / "tiny.npz").read_bytes()
    offer(content=content, sha256=hashlib.sha256(content).hexdigest())
    c = model_config()
    params, batch_stats, report = pretrained.load_backbone("tiny", "", *shapes(c), c)
    check(params, batch_stats, tensors)
    assert report.source == "torchvision"
    draft = plans._Draft({"init.weights": "tiny", **{f"model.{k}": v for k, v in c.items()}})
    cpu = plans.Machine("cpu", "cpu", 1, 2**30, 2**30, 2)
    plans._network(draft, cpu)
    assert draft.config.init.weights == "tiny"
    assert json.loads(config_lib.to_json(draft.config))["init"]["source"] == "torchvision"
