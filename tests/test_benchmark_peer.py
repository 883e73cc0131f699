"""PyTorch beside the package: the same function or an error, and what its failures leave."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import runs
from duc_dlc_jax.benchmark import __main__ as benchmark
from duc_dlc_jax.benchmark import model, peer
from duc_dlc_jax.benchmark.figures import Figures
from duc_dlc_jax.config import ConfigError

torch = pytest.importorskip("torch", reason="the peer needs PyTorch")

pytestmark = pytest.mark.commands


@pytest.fixture(scope="module")
def work():
    ceilings = {"flop_per_second": 1e11, "byte_per_second": 1e10}
    return model.Work(runs.tiny_config("data"), (64, 96), ceilings)


def running(work, kinds):
    data = model.random_batch(work.config, work.classes)
    image = np.zeros((1, *work.size, 3), np.uint8)
    return contextlib.closing(peer.Peer(work, data, image, kinds))


def script(tmp_path, monkeypatch, text: str) -> None:
    """Lets PyTorch's process run the peer after `text`."""
    file = tmp_path / "peer.py"
    file.write_text(
        f"import os, sys\nsys.path[:0] = [{str(peer.SCRIPT.parent)!r}]\nimport torch_peer\n"
        f"{text}\ntorch_peer.main(sys.argv[1])\n"
    )
    monkeypatch.setattr(peer, "SCRIPT", file)


def test_both_layouts_beside_ours(tmp_path):
    file = tmp_path / "figures.json"
    small = [f"--config.{name}={value}" for name, value in runs.TINY.items()]
    command = [sys.executable, "-m", "duc_dlc_jax.benchmark", "--config=configs/demo.py", *small]
    command += ["--steps=1", "--rounds=2", "--peer=torch", "--threads=1", f"--json={file}"]
    printed = runs.run([*command, "--ways=eager", "--ways=eager-nchw"]).stdout
    values = json.loads(file.read_text())
    assert set(values["peer"]["differences"]) == {"logits", *peer.BOUNDS}
    assert max(values["peer"]["differences"].values()) < 1e-4
    for what in ("train", "infer"):
        ways = values[what]["peer"]["ways"]
        assert list(ways) == ["eager", "eager-nchw"]
        best = min(ways.values(), key=lambda way: way["seconds"])
        assert best["ratios"] == [t / o for t, o in zip(best["rounds"], best["ours"], strict=True)]
        ratio = f"{what}: PyTorch's time over ours: {np.median(best['ratios']):.2f}"
        assert ratio in printed
        assert f"{what}, PyTorch, eager-nchw: " in printed
    del values["infer"]["peer"]["ways"]["eager"]
    file.write_text(json.dumps(values))
    printed = runs.run([*command, "--what=infer", "--ways=eager", "--ways=eager-nchw"]).stdout
    after = json.loads(file.read_text())
    assert after["train"] == values["train"]
    assert set(after["infer"]["peer"]["ways"]) == {"eager", "eager-nchw"}
    assert "infer, peer, ways, eager-nchw: in" in printed


FAULTS = {
    "logits": "of = torch_peer.Peer.logits\ntorch_peer.Peer.logits = lambda *x: 3 * of(*x) + 1",
    "gradient": "of = torch_peer.FastDUC.statistics\n"
    "def statistics(self, image, weight, norm):\n"
    "    factor, shift = of(self, image, weight, norm)\n"
    "    return (1.1 * factor if norm.training else factor), shift\n"
    "torch_peer.FastDUC.statistics = statistics",
}


@pytest.mark.parametrize("name", FAULTS)
def test_another_function_is_an_error(work, tmp_path, monkeypatch, name):
    script(tmp_path, monkeypatch, FAULTS[name])
    kinds = ["infer"] if name == "logits" else ["train", "infer"]
    with pytest.raises(ConfigError, match=f"PyTorch's {name} differs"), running(work, kinds):
        pass


DEATHS = {
    "at its start": ("os._exit(3)", "ended with 3"),
    "in its second way": (
        "of = torch_peer.Peer.prepare\n"
        "def prepare(self, what, way):\n"
        "    return os._exit(3) if way == 'eager-nchw' else of(self, what, way)\n"
        "torch_peer.Peer.prepare = prepare",
        "",
    ),
}


@pytest.mark.parametrize("when", DEATHS)
def test_ours_are_written_before_a_peer_that_dies(work, tmp_path, monkeypatch, when):
    text, error = DEATHS[when]
    script(tmp_path, monkeypatch, text)
    monkeypatch.setattr(model, "Work", lambda config, size, ceilings: work)
    args = SimpleNamespace(
        config=work.config, size="", steps=1, rounds=2, peer="torch", profile=False, threads=0,
        ways=["eager", "eager-nchw", "compile"], json=str(tmp_path / "figures.json"), again=False,
        networks=[], xla_options=[],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext():
        benchmark.rates(args, ["infer"], Figures(args.json))
    values = json.loads((tmp_path / "figures.json").read_text())["infer"]
    assert values["seconds"] > 0
    if not error:
        ways = values["peer"]["ways"]
        assert "ended with 3" in ways["eager-nchw"]["failed"]
        assert ["failed" in way for way in ways.values()] == [False, True, True]


def test_a_way_that_raises_is_left_out(work, tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, "torch_peer.torch.compile = None")
    with running(work, ["infer"]) as torch_process:
        found = {
            way: model.beside_peer(torch_process, "infer", lambda: 0, way, 1, 1)
            for way in ("compile", "eager")
        }
        assert "TypeError" in found["compile"]["failed"]
        assert found["eager"]["seconds"] > 0
        groups = torch_process.groups(1)
        assert {"stem", "layer4", "guidance", "dlc", "other"} <= set(groups)


def test_the_compiler_takes_loss_and_labels_whole(work, monkeypatch):
    """Any break of the graph would run the rest of it without the compiler."""
    monkeypatch.syspath_prepend(peer.SCRIPT.parent)
    import torch_peer

    import torch_twin

    monkeypatch.setattr(torch_twin, "DUC", torch_peer.FastDUC)
    with running(work, ["infer"]) as other:
        side = torch_peer.Peer(peer.pathlib.Path(other._folder.name))

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)

    assert side.fastest_form("train", compiled) in torch_peer.FORMS
    compiled(side.loss)(side.images, side.labels).backward()
    assert all(p.grad is not None for p in side.net.parameters())
    side.net.eval()
    assert side.infer(compiled(side.label)).shape == (1, 64, 96)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.aux_head", True), ("model.context", "psp"), ("loss.ohem_threshold", 0.7)],
)
def test_what_pytorch_does_not_compute_is_refused(name, value):
    config = runs.tiny_config("data", **{name.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=f"{name}=.*{value}"):
        peer.check_config(config, ["train"], 1)
    if not name.startswith("model.context"):
        peer.check_config(config, ["infer"], 1)
    with pytest.raises(ConfigError, match="one device"):
        peer.check_config(runs.tiny_config("data"), ["train"], 2)
