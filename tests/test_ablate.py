"""Grids of variants: their order, their questions, and what is done."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import workdirs
from duc_dlc_jax.ablate import grid, runner
from duc_dlc_jax.ablate.__main__ import conclude, listed, report_command, train_all
from duc_dlc_jax.ablate.grid import Run, Variant, parts
from duc_dlc_jax.ablate.results import Results, weights_digest
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from duc_dlc_jax.models import segmenter

pytestmark = pytest.mark.commands
DATA = runner.Data

TWO = [Variant("fcn", parts("none", "none"), 2), Variant("duc_dlc", parts("duc", "dlc"), 1)]


# The grid


def test_the_packaged_grid_asks_the_question_first():
    """FCN, the control, +DUC, +DLC, both, DeepLabv3; every module of the registry is in it."""
    base = config_lib.load("configs/ablation_camvid.py")
    found = grid.load("configs/ablation_camvid.py").variants
    configs = [variant.config(base, 0) for variant in found]
    pairs = [(c.model.upsampling, c.model.context) for c in configs]
    order = ["none none", "bilinear none", "duc none", "bilinear dlc", "duc dlc", "none aspp"]
    assert [" ".join(pair) for pair in pairs[:6]] == order
    assert [v.seeds for v in found[:6]] == [10] * 5 + [3]
    assert {u for u, _ in pairs} == set(config_lib.CHOICES["model.upsampling"])
    assert {c for _, c in pairs} == set(config_lib.CHOICES["model.context"])
    assert len({(c.train.to_json(), c.data.to_json(), c.optimizer.to_json()) for c in configs}) == 1


def test_the_reduced_protocol_is_the_first_six_of_the_full_one():
    full, small = (grid.load(f"configs/ablation_camvid{x}.py") for x in ("", "_small"))
    names = ["fcn", "bilinear", "duc", "dlc", "duc_dlc", "deeplabv3"]
    assert [v.name for v in small.variants] == names
    assert [v.changes for v in small.variants] == [v.changes for v in full.variants[:6]]
    assert [v.seeds for v in small.variants] == [3] * 6
    assert small.comparisons == {"the parts": full.comparisons["the parts"]}
    config = config_lib.load("configs/ablation_camvid_small.py")
    assert config.train.steps * config.train.batch_size == 2720


def test_runs_go_variant_by_variant():
    names = [run.name for run in grid.runs(TWO)]
    assert names == ["fcn-seed0", "fcn-seed1", "duc_dlc-seed0"]
    assert [run.name for run in grid.runs(TWO, "duc*", [3, 5])] == [
        "duc_dlc-seed3",
        "duc_dlc-seed5",
    ]
    with pytest.raises(ConfigError, match=r"--only=dlc names no variant; there are fcn, duc_dlc"):
        grid.runs(TWO, "fcn,dlc")


def test_a_file_without_variants_or_with_two_of_a_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"demo\.py has no get_variants\(\)"):
        grid.load("configs/demo.py")
    path = tmp_path / "mine.py"
    path.write_text(
        "from duc_dlc_jax.ablate.grid import Variant\n\n\n"
        "def get_variants():\n    return [Variant('a', {}), Variant('a', {'seed': 1})]\n"
    )
    with pytest.raises(ConfigError, match="several variants are called a"):
        grid.load(str(path))


@pytest.mark.parametrize("name", ["variants", "comparisons", "title"])
def test_an_error_in_a_file_is_one_line(tmp_path, name):
    functions = {"variants": "[Variant('a', {})]", "comparisons": "[]", "title": "'A'"}
    functions[name] = "[Variant('b', seedz=3)]"
    path = tmp_path / "mine.py"
    path.write_text(
        "from duc_dlc_jax.ablate.grid import Variant\n"
        + "".join(f"def get_{n}():\n    return {value}\n" for n, value in functions.items())
    )
    with pytest.raises(ConfigError, match=r"mine\.py, line \d: TypeError: .*seedz"):
        grid.load(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.contexts": "dlc"}, "the nearest one is model.context"),
        ({"model.context": "aspp2"}, r"model\.context='aspp2'; allowed: 'dlc'"),
    ],
)
def test_a_variant_that_cannot_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Variant("a", changes).config(config_lib.default(), 0)


def test_questions_about_other_variants_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from duc_dlc_jax.ablate.grid import Variant\n\n\n"
        "def get_variants():\n    return [Variant('a', {})]\n\n\n"
        "def get_comparisons():\n    return [('a', 'b', 'why')]\n"
    )
    with pytest.raises(ConfigError, match=r"get_comparisons\(\) names 'b'; there are a"):
        grid.load(str(path))


def test_every_variant_of_the_packaged_grid_is_asked_about():
    found = grid.load("configs/ablation_camvid.py")
    assert [len(rows) for rows in found.comparisons.values()] == [8, 4, 4, 4, 7]
    rows = [row for questions in found.comparisons.values() for row in questions]
    asked = {name for row in rows for name in row[:2]}
    assert asked == {variant.name for variant in found.variants}
    assert len(set(rows)) == len(rows)


def test_the_recipe_and_its_title_are_those_of_the_file():
    found = grid.load("configs/ablation_camvid.py")
    assert found.title.startswith("The full recipe")
    assert (found.recipe["train.epochs"], found.recipe["train.steps"]) == (200.0, 0)
    small = grid.load("configs/ablation_camvid_small.py")
    assert small.title == "Reduced protocol: crops of 240, 340 steps, on one CPU core"
    assert (small.recipe["data.crop_size"], small.recipe["train.steps"]) == (240, 340)


def test_without_questions_every_variant_is_compared_with_the_first():
    found = grid.load("configs/ablation_grids.py").comparisons[""]
    assert found[0] == ("corners", "stride", "model.resize_grid=stride")
    assert [(a, b) for a, b, _ in found[1:]] == [("corners", "no_antialias")]


# What is done


class FakeTrainer:
    """Writes down what it would train; `duc_dlc` fails, a run takes `seconds`."""

    made: ClassVar[list] = []
    seconds, cut_off = 0.0, False
    clock = SimpleNamespace(now=0.0)

    def __init__(self, config, data):
        self.made.append(config.model.context)

    def run(self, config, files):
        self.clock.now += self.seconds
        if self.cut_off:
            workdirs.write(files.unfinished, config, label_spec("scenes"))
            (files.unfinished / "checkpoints" / "2").mkdir(parents=True)
            raise KeyboardInterrupt
        if config.model.context == "dlc":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore lines")
        val = {"mIoU": 0.5, "PA": 0.75, "boundary": {"mean_iou": 0.25}}
        seconds = {"total": self.seconds}
        return {"seed": config.seed, "config": config.to_dict(), "val": val, "seconds": seconds}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner, "Trainer", FakeTrainer)
    monkeypatch.setattr(runner, "Data", lambda data: None)
    monkeypatch.setattr(FakeTrainer, "made", [])
    monkeypatch.setattr(FakeTrainer, "clock", SimpleNamespace(now=0.0))
    monkeypatch.setattr("time.monotonic", lambda: FakeTrainer.clock.now)
    return FakeTrainer


def test_a_grid_goes_on_after_a_failure_and_where_it_stopped(fake, tmp_path, capsys):
    results, runs = Results(tmp_path), grid.runs(TWO)
    assert train_all(config_lib.default(), runs, results, float("inf"), False) == 1
    assert fake.made == ["none", "dlc"]  # one program for both seeds
    assert results.failure(runs[2]) == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert sorted(p.name for p in results.folder.iterdir()) == [
        "duc_dlc-seed0.failed", "fcn-seed0.json", "fcn-seed1.json",
    ]  # fmt: skip
    lines = listed(runs, results).splitlines()
    assert "mIoU 0.5000" in lines[0]
    assert "failed, RuntimeError" in lines[2]
    with pytest.raises(SystemExit, match=r"failed: duc_dlc-seed0; --list says why"):
        conclude(runs, results)
    assert capsys.readouterr().out.endswith("2 of 3 runs are done; the same command goes on\n")
    results.path(runs[1]).unlink()
    train_all(config_lib.default(), runs, results, float("inf"), False)
    assert fake.made == ["none", "dlc", "none", "dlc"]
    assert results.done(runs[1])["seed"] == 1


def test_a_variant_trains_on_the_split_that_it_names(fake, tmp_path, monkeypatch):
    """What two variants share is opened once."""
    opened, more = [], {"data.train_split": "train+extra"}
    monkeypatch.setattr(runner, "Data", DATA)
    monkeypatch.setattr(runner, "open_records", lambda data, split: opened.append(split))
    monkeypatch.setattr(runner.crops, "choose", lambda val: [])
    alone = parts("none", "none")
    variants = [Variant("a", alone), Variant("b", alone | more), Variant("c", alone | more)]
    train_all(config_lib.default(), grid.runs(variants), Results(tmp_path), float("inf"), False)
    assert opened == ["train", "val", "train+extra", "val"]


def test_numbers_and_kernels_are_those_that_the_configuration_asks_for(fake, tmp_path, monkeypatch):
    seen, base = [], config_lib.default()
    base.model.dtype, base.train.deterministic = "float64", True
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(segmenter, "enable_dtype", lambda model: seen.append(model.dtype))
    train_all(base, [Run(TWO[0], 0)], Results(tmp_path), float("inf"), False)
    assert seen == ["float64"]
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"


def test_no_run_starts_that_would_end_after_the_limit(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "seconds", 40.0)
    results, runs = Results(tmp_path), grid.runs([Variant("fcn", parts("none", "none"), 5)])
    assert train_all(config_lib.default(), runs, results, 100.0, False) == 3
    assert len(results.all()) == 2


def test_runs_of_two_budgets_do_not_mix(fake, tmp_path):
    results, base = Results(tmp_path), config_lib.default()
    run = Run(TWO[0], 0)
    train_all(base, [run], results, float("inf"), False)
    results.check(run, run.variant.config(base, 0))
    base.data.threads, base.data.dir, base.data.staging_dir = 64, "elsewhere", "disk"
    base.train.log_every, base.train.keep_latest, base.eval.pictures = 7, 7, 7  # circumstances
    results.check(run, run.variant.config(base, 0))
    base.train.epochs = 30.0
    with pytest.raises(
        ConfigError, match=r"fcn-seed0\.json was run with train\.epochs=120\.0 \(now"
    ):
        results.check(run, run.variant.config(base, 0))


def test_runs_with_and_without_initial_weights_do_not_mix(fake, tmp_path):
    results, base = Results(tmp_path), config_lib.default()
    base.init.weights = "one.npz"
    run = Run(TWO[0], 0)
    train_all(base, [run], results, float("inf"), False)
    base.init.weights = "elsewhere/one.npz"
    results.check(run, run.variant.config(base, 0))
    base.init.weights = ""
    with pytest.raises(ConfigError, match=r"run with init\.weights='a file' \(now ''\)"):
        results.check(run, run.variant.config(base, 0))


def test_runs_from_two_files_of_weights_do_not_mix(fake, tmp_path):
    """Where both are known: runs from before have no digest."""
    results, base = Results(tmp_path), config_lib.default()
    base.init.weights = str(tmp_path / "one.npz")
    run = Run(TWO[0], 0)
    config, digests = run.variant.config(base, 0), []
    for content in (b"one", b"two"):
        (tmp_path / "one.npz").write_bytes(content)
        digests.append(weights_digest(config.init.weights, config.init.source))
    assert digests[0] == hashlib.sha256(b"one").hexdigest()
    assert weights_digest("", "") == ""
    train_all(base, [run], results, float("inf"), False)
    results.check(run, config, digests[1])
    results.write(run, results.done(run) | {"weights_sha256": digests[0]})
    results.check(run, config, digests[0])
    results.check(run, config)
    expected = rf"init\.weights of SHA-256 {digests[0][:8]} \(now {digests[1][:8]}\)"
    with pytest.raises(ConfigError, match=expected):
        results.check(run, config, digests[1])


def test_a_run_that_was_cut_off_is_begun_and_keeps_its_budget(fake, tmp_path, monkeypatch):
    results, base = Results(tmp_path), config_lib.default()
    run = Run(TWO[0], 0)
    monkeypatch.setattr(fake, "cut_off", True)
    with pytest.raises(KeyboardInterrupt):
        train_all(base, [run], results, float("inf"), False)
    assert listed([run], results).split()[1] == "begun"
    results.check(run, run.variant.config(base, 0))
    other = base.copy_and_resolve_references()
    other.train.epochs = 30.0
    with pytest.raises(
        ConfigError, match=r"unfinished/fcn-seed0 was run with train\.epochs=120\.0"
    ):
        results.check(run, run.variant.config(other, 0))
    monkeypatch.setattr(fake, "cut_off", False)
    train_all(base, [run], results, float("inf"), False)
    assert results.done(run)
    assert not (tmp_path / "unfinished" / run.name).exists()


def test_what_a_process_left_that_was_killed_as_its_run_ended_is_cleared(tmp_path):
    results, (ended, begun, _) = Results(tmp_path), grid.runs(TWO)
    folders = [results.files(run).unfinished for run in (ended, begun)]
    results.write(ended, {"seed": 0})
    for folder in folders:
        (folder / "checkpoints" / "2").mkdir(parents=True)
    results.clear([ended, begun])
    assert [folder.exists() for folder in folders] == [False, True]


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    results, run = Results(tmp_path), Run(TWO[0], 0)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write(run, {"seed": 0})
    assert results.done(run) is None
    assert results.all() == []


def test_the_command_lists_its_runs(tmp_path):
    command = [sys.executable, "-m", "duc_dlc_jax.ablate", f"--workdir={tmp_path}", "--list"]
    command += ["--config=configs/ablation_camvid.py", "--only=duc", "--seeds=0,4,0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["duc-seed0", "duc-seed4"]


def test_the_page_of_a_committed_workdir_names_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = "python -m duc_dlc_jax.ablate --report"
    inside = report_command("mine.py", tmp_path / "docs" / "mine", "docs/mine.md")
    assert inside == f"{command} --config=mine.py --workdir=docs/mine --output=docs/mine.md"
    outside = report_command("", tmp_path / "runs", "mine.md")
    assert outside == f"{command} --workdir=DIR --output=mine.md"
