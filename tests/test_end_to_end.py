"""The whole way on a tiny network: records -> training -> checkpoints -> evaluation -> masks."""

import dataclasses
import functools
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from duc_dlc_jax import evaluate, profiling, protocols, sharding, submit, workdirs
from duc_dlc_jax import train as train_lib
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import builders, pipeline
from duc_dlc_jax.data.labels import LabelSpec
from duc_dlc_jax.data.records import open_records
from duc_dlc_jax.errors import STOP_SIGNALS, Stopped
from duc_dlc_jax.stopping import StopSignal
from duc_dlc_jax.train import train
from repository import ROOT
from runs import command, run, saved_state, tiny_config

EMA = 0.9


def averaging(scenes_dir):
    """The configuration that these runs have in common: they compile one step."""
    return tiny_config(scenes_dir, optimizer__ema_decay=EMA)


@pytest.fixture(scope="module")
def trained(scenes_dir, tmp_path_factory):
    """(workdir, scores) of six steps without a break."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(averaging(scenes_dir), workdir)


class Killed(BaseException):
    """Stands for whatever ends a process between two steps."""


def interrupt_after(monkeypatch, batches):
    original = pipeline.train_iterator

    def limited(*args, **kwargs):
        for count, batch in enumerate(original(*args, **kwargs)):
            if count == batches:
                raise Killed
            yield batch

    monkeypatch.setattr(pipeline, "train_iterator", limited)


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_training_leaves_a_trace_of_its_steps(trained, scenes_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "FIRST", 2)
    monkeypatch.setattr(profiling, "STEPS", 2)
    config = averaging(scenes_dir)
    config.profile = str(tmp_path / "trace")
    train(config, tmp_path / "run")
    assert_same_state(saved_state(trained[0], 6), saved_state(tmp_path / "run", 6))
    (folder,) = (tmp_path / "trace/plugins/profile").iterdir()
    (file,) = folder.glob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert sum("train_step" in name for name in names) >= 2
    with gzip.open(folder / "perfetto_trace.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)


def test_workdir_holds_what_the_docs_say(trained):
    workdir, scores = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 6]
    for name in ("loss", "learning_rate", "images_per_second", "data_wait_share"):
        assert all(np.isfinite(line[f"train/{name}"]) for line in lines[:3])
    rates = [1e-2 * (1 - done / 6) ** 0.9 for done in (1, 3, 5)]  # by the updates before
    assert [line["train/learning_rate"] for line in lines[:3]] == pytest.approx(rates)
    assert lines[-1]["val/mIoU"] == pytest.approx(scores["mIoU"])
    assert "val_iou/pole" in lines[-1]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    assert "backbone/conv1/kernel" in (workdir / "parameters.txt").read_text()
    assert list(workdir.glob("events.out.tfevents*"))
    (picture,) = (workdir / "pictures" / "step-6").iterdir()
    with Image.open(picture) as image:
        assert image.size == (3 * 256, 192)


def test_every_pixel_is_counted_once(trained, scenes_dir):
    _, scores = trained
    records = open_records(averaging(scenes_dir).data, "val")
    valid = sum((records[i]["label"] != 255).sum() for i in range(len(records)))
    assert scores["matrix"].sum() == valid
    assert scores["images"] == len(records) == 40


@pytest.fixture(scope="module")
def interrupted(scenes_dir, tmp_path_factory):
    """The workdir of a run that ended after five of its six steps."""
    workdir = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Killed):
            train(averaging(scenes_dir), workdir)
    return workdir


def test_interrupted_run_equals_the_uninterrupted_bit_for_bit(
    trained, interrupted, scenes_dir, tmp_path
):
    workdir = shutil.copytree(interrupted, tmp_path / "run")
    scores = train(averaging(scenes_dir), workdir)
    assert_same_state(saved_state(workdir, 6), saved_state(trained[0], 6))
    np.testing.assert_array_equal(scores["matrix"], trained[1]["matrix"])


def counting(*_):
    """In place of `sharding.jit_train_step`: a step that only counts."""
    figures = {"loss": np.float32(1), "grad_norm": np.float32(1), "PA": np.float32(1)}
    return lambda state, batch, seed: (state.replace(step=state.step + 1), figures)


@pytest.mark.fault
def test_a_run_resumed_with_another_batch_size_sees_each_image_once(
    few_scenes, tmp_path, monkeypatch
):
    """Also after the checkpoints that follow the first of the new size."""
    monkeypatch.setattr(sharding, "jit_train_step", counting)

    def run(batch_size, batches):
        changes = {"train__batch_size": batch_size, "train__checkpoint_every": 1}
        config = tiny_config(few_scenes, train__steps=99, **changes)
        with monkeypatch.context() as patch:
            interrupt_after(patch, batches)
            train(config, tmp_path, record_names=True)

    for batch_size in (4, 2, 2):
        with pytest.raises(Killed):
            run(batch_size, 1)
    with pytest.raises(ConfigError, match=r"batch_size=3 .* \(8 = 2 x 3 \+ 2\); use 1, or"):
        run(3, 1)
    records = open_records(tiny_config(few_scenes).data, "train")
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    seen = [name for line in lines for name in line["records"]]
    first = pipeline.permutation(0, 0, len(records))[: 4 + 2 + 2]
    assert seen == [records.name(int(record)) for record in first]


@pytest.mark.fault
def test_ctrl_c_saves_the_step(few_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "jit_train_step", counting)
    original = pipeline.train_iterator

    def interrupted(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs), 1):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(pipeline, "train_iterator", interrupted)
    with pytest.raises(Stopped, match="stopped by SIGINT; step 1 is saved"):
        train(tiny_config(few_scenes), tmp_path)
    assert saved_state(tmp_path, 1)["['step']"] == 1


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop_unless_the_process_was_started_to_ignore_it(number):
    stop, before = StopSignal(), signal.getsignal(number)
    with stop.listening():
        os.kill(os.getpid(), number)
        assert stop.reached()
        assert stop.signal == number.name
    assert signal.getsignal(number) == before
    stop = StopSignal()
    try:
        signal.signal(number, signal.SIG_IGN)
        with stop.listening():
            os.kill(os.getpid(), number)
            assert not stop.reached()
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_at_once():
    stop = StopSignal()
    with stop.listening():
        assert not stop.reached()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reached()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_planted_fault_iterator_restarted(trained, interrupted, scenes_dir, tmp_path, monkeypatch):
    """A resumed run that reads its data from the beginning again ends elsewhere."""
    workdir = shutil.copytree(interrupted, tmp_path / "run")
    original = pipeline.train_iterator
    monkeypatch.setattr(
        pipeline, "train_iterator", lambda *a, **k: original(*a, **(k | {"start_step": 0}))
    )
    train(averaging(scenes_dir), workdir)
    with pytest.raises(AssertionError):
        assert_same_state(saved_state(workdir, 6), saved_state(trained[0], 6))


def test_finished_run_started_again_only_evaluates(trained, scenes_dir, capfd):
    workdir, scores = trained
    before = saved_state(workdir, 6)
    again = train(averaging(scenes_dir), workdir)
    assert_same_state(before, saved_state(workdir, 6))
    assert again["mIoU"] == scores["mIoU"]
    assert "step 6/6" not in capfd.readouterr().err


def test_a_workdir_keeps_its_classes(trained, scenes_dir, tmp_path):
    """As many classes in another order would give the trained network other names."""
    workdir, _ = trained
    before = (workdir / "labels.json").read_text()
    data = shutil.copytree(scenes_dir, tmp_path / "data")
    (path,) = data.rglob(builders.SPEC_FILE)
    spec = LabelSpec.from_json(path.read_text())
    other = dataclasses.replace(spec, classes=spec.classes[::-1])
    path.write_text(other.to_json())
    with pytest.raises(
        ConfigError, match=rf"to label {', '.join(spec.classes)}; .*init\.checkpoint"
    ):
        train(averaging(data), workdir)
    assert (workdir / "labels.json").read_text() == before
    raw = {raw + 100: train_id for raw, train_id in spec.raw_to_train.items()}
    workdirs.check_classes(workdir, dataclasses.replace(spec, raw_to_train=raw))


def test_missing_weights_leave_no_workdir(scenes_dir, tmp_path):
    config = averaging(scenes_dir)
    config.init.weights = str(tmp_path / "resnet50.npz")
    with pytest.raises(FileNotFoundError, match=r"config\.init\.weights=.*: no such file"):
        train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_next_commands_can_be_pasted(tmp_path):
    workdir = tmp_path / "two words"
    saved = SimpleNamespace(directory=workdir / "checkpoints", best_step=lambda: 6)
    commands = train_lib._next_commands(workdir, saved).splitlines()[2:]
    for name, words in (line.split(maxsplit=1) for line in commands):
        assert str(workdir) in [word.partition("=")[2] for word in shlex.split(words)], name


def test_a_loss_that_is_not_finite_stops_before_saving(scenes_dir, tmp_path, monkeypatch):
    original = sharding.jit_train_step

    def broken(*args):
        step = original(*args)

        def run(state, batch, seed):
            state, metrics = step(state, batch, seed)
            return state, metrics | {"loss": metrics["loss"] * np.nan}

        return run

    monkeypatch.setattr(sharding, "jit_train_step", broken)
    with pytest.raises(FloatingPointError, match=r"optimizer\.learning_rate"):
        train(averaging(scenes_dir), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_evaluation_does_not_depend_on_the_batch(trained, scenes_dir):
    workdir, scores = trained
    run = workdirs.load(workdir)
    records = open_records(run.config.data, "val")
    for batch in (3, 1):
        again, _ = evaluate.Evaluator(run.model, run.spec, batch).run(
            run.variables, pipeline.eval_examples(records)
        )
        assert abs(again["matrix"] - scores["matrix"]).sum() <= 8  # arg-max ties by rounding
        assert again["matrix"].sum() == scores["matrix"].sum()


def test_images_of_several_sizes_evaluate_together(trained):
    run = workdirs.load(trained[0])
    rng = np.random.default_rng(0)

    def example(height, width):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        return {"image": image, "label": np.zeros((height, width), np.uint8), "name": "x"}

    examples = [example(40, 56), example(33, 47), example(40, 56), example(40, 56)]
    scores, kept = evaluate.Evaluator(run.model, run.spec, 2).run(run.variables, examples, keep=4)
    assert scores["matrix"].sum() == 3 * 40 * 56 + 33 * 47
    apply = jax.jit(run.model.apply)
    for example in kept:
        expected = apply(run.variables, example["image"][None]).argmax(-1)[0]
        assert (expected == example["prediction"]).mean() > 0.999


def test_evaluate_command(trained, tmp_path):
    command = [sys.executable, "-m", "duc_dlc_jax.evaluate", f"--workdir={trained[0]}"]
    result = run([*command, f"--json={tmp_path / 'new' / 'scores.json'}"])
    figures = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert figures["mIoU"] == pytest.approx(trained[1]["mIoU"], abs=1e-5)
    assert figures["protocol"] in result.stdout
    assert (figures["eval"]["mode"], figures["eval"]["batch_size"]) == ("whole", 8)
    assert np.sum(figures["confusion_matrix"]) == trained[1]["matrix"].sum()


def test_evaluate_command_by_several_protocols(trained, tmp_path):
    arguments = [
        "--protocol=single,sliding",
        "--set=crop_size=128",
        "--set=stride=96",
        "--boundary",
    ]
    command = [sys.executable, "-m", "duc_dlc_jax.evaluate", f"--workdir={trained[0]}"]
    command += [*arguments, "--absent=zero", f"--json={tmp_path / 'scores.json'}"]
    result = run([*command, f"--report={tmp_path / 'report'}", "--report_images=2"])
    written = json.loads((tmp_path / "scores.json").read_text())
    assert list(written) == ["step", "checkpoint", "split", "protocols", "config"]
    assert (written["checkpoint"], written["split"]) == ("best", "val")
    used = {name: figures["eval"] for name, figures in written["protocols"].items()}
    assert [used[name]["mode"] for name in ("single", "sliding")] == ["whole", "sliding"]
    assert used["sliding"]["crop_size"] == 128
    assert "eval" not in written["config"]
    single, figures = (written["protocols"][name] for name in ("single", "sliding"))
    assert single["mIoU"] == pytest.approx(trained[1]["mIoU"], abs=1e-5)
    assert single["confusion_matrix"] != figures["confusion_matrix"]
    assert_reports(tmp_path / "report" / "index.html", written, trained[0])
    assert figures["protocol"] == (
        "single scale, windows of 128 pixels at stride 96, overlaps averaged by count, mean of the "
        "softmax, logits resized to the label; absent classes count as 0"
    )
    assert f"(40 images; {figures['protocol']})" in result.stdout
    assert "boundary IoU: 0.02 of the diagonal; boundary F: 3 pixels" in result.stdout
    assert result.stdout.count("compiled: 1 programs with the network") == 2
    row = ["sliding", *(f"{figures[name]:.4f}" for name in evaluate.HEADLINE)]
    row += [f"{figures['boundary'][name]:.4f}" for name in ("mean_iou", "mean_f")]
    assert result.stdout.splitlines()[-2].split() == row
    assert np.sum(figures["confusion_matrix"]) == trained[1]["matrix"].sum()
    assert figures["pixels"]["sky"] == np.sum(figures["confusion_matrix"], 1)[0]
    assert None not in figures["iou"].values()
    assert 0 < figures["boundary"]["mean_iou"] < figures["mIoU"]


def assert_reports(page, written, workdir):
    """The page shows the figures, curves and images of the run."""
    (embedded,) = re.findall(r'id="data">(.*?)</script>', page.read_text())
    data = json.loads(embedded)
    for shown, (name, figures) in zip(data["protocols"], written["protocols"].items(), strict=True):
        assert shown["name"] == name
        assert shown["sentence"].startswith(figures["protocol"])
        assert shown["figures"]["mIoU"] == figures["mIoU"]
    assert data["matrix"] == written["protocols"]["single"]["confusion_matrix"]
    assert data["curves"]["val/mIoU"][-1][0] == 6
    assert len(data["per_image"]) == 40
    mious = {group: [] for group in ("best", "median", "worst")}
    for example in data["examples"]:
        mious[example["group"]].append(example["miou"])
    assert sorted(mious["best"] + mious["worst"], reverse=True) == pytest.approx(
        sorted(data["per_image"], reverse=True)[:2] + sorted(data["per_image"])[1::-1], abs=1e-4
    )
    assert [len(group) for group in mious.values()] == [2, 2, 2]


def test_submit_command_names_the_data_sets_it_knows(trained, tmp_path):
    command = [sys.executable, "-m", "duc_dlc_jax.submit", f"--workdir={trained[0]}"]
    result = run([*command, "--split=val", f"--output={tmp_path / 'x.zip'}"], check=False)
    assert result.returncode == 2
    expected = (
        "error: no submission format for the data set 'scenes'; there are: cityscapes, ade20k"
    )
    assert result.stderr.splitlines()[-1] == expected


def test_predictions_of_a_split_become_an_archive(trained, tmp_path):
    loaded = workdirs.load(trained[0])
    spec = dataclasses.replace(loaded.spec, name="ade20k")
    records = open_records(loaded.config.data, "val")
    named = (
        example | {"name": f"ADE_val_{i:08d}"}
        for i, example in enumerate(pipeline.eval_examples(records))
    )
    predictions = evaluate.Evaluator(loaded.model, spec, 8).predictions(loaded.variables, named)
    submit.write_archive(tmp_path / "x.zip", spec, predictions, 40)


def test_predict_command(trained, scenes_dir, tmp_path):
    """Scenes labelled as `evaluate` does, to the pixel; a broken file is named at the end."""
    loaded = workdirs.load(trained[0])
    records = open_records(averaging(scenes_dir).data, "val")
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(records[i]["image"]).save(images / "deep" / f"{i}.png")
    (images / "broken.jpg").write_bytes(b"not an image")
    protocol = ["--protocol=multi_scale", "--set=scales=(0.5, 1.0)"]
    arguments = [f"--input={images}", f"--output={tmp_path / 'out'}", *protocol]
    command = [sys.executable, "-m", "duc_dlc_jax.predict", f"--model={trained[0]}", *arguments]
    result = run([*command, "--outputs=ids,shares"], check=False)
    assert result.returncode == 1
    assert "problems with 1 of 4 files" in result.stderr
    assert "broken.jpg: 12 bytes that are not a readable" in result.stderr
    assert "3 images in " in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ids", "shares.jsonl"]
    chosen = protocols.Protocol(scales=(0.5, 1.0), flip=True, crop_size=64, stride=42)
    evaluator = evaluate.Evaluator(loaded.model, loaded.spec, 8, chosen)
    for example in evaluator.predictions(loaded.variables, [records[i] for i in range(3)]):
        (number,) = (i for i in range(3) if records[i]["name"] == example["name"])
        with Image.open(tmp_path / "out" / "ids" / f"deep_{number}.png") as ids:
            assert ids.mode == "P"
            np.testing.assert_array_equal(np.array(ids), example["prediction"])


def test_checkpoints_can_be_named(trained):
    assert workdirs.load(trained[0], "4").step == 4
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        workdirs.load(trained[0], "3")
    with pytest.raises(ValueError, match="best, latest, a step"):
        workdirs.load(trained[0], "newest")


def test_the_readme_loads_a_trained_network(trained):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "workdirs" in block)
    shapes = SimpleNamespace(jit=lambda f: functools.partial(jax.eval_shape, f))
    names = {"image": np.zeros((1, 64, 64, 3), np.uint8), "jax": shapes}
    exec(code.replace("runs/camvid", str(trained[0])), names)
    assert names["logits"].shape == (1, 64, 64, names["run"].spec.num_classes)


def test_trains_without_tensorflow(scenes_dir, tmp_path):
    """JSON lines and one warning instead of TensorBoard events."""
    result = run(command(scenes_dir, tmp_path, optimizer__ema_decay=EMA), tensorflow=False)
    assert result.stderr.count("no TensorBoard events") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert not list(tmp_path.glob("events*"))


def test_the_average_is_kept_and_evaluated(trained):
    state = saved_state(trained[0], 6)
    name = "['classifier']['kernel']"
    average, last = state[f"['ema']['params']{name}"], state[f"['params']{name}"]
    assert not np.array_equal(average, last)
    loaded = workdirs.load(trained[0], "6")
    np.testing.assert_array_equal(loaded.variables["params"]["classifier"]["kernel"], average)
    statistics = loaded.variables["batch_stats"]["backbone"]["bn1"]["mean"]
    np.testing.assert_array_equal(
        statistics, state["['ema']['batch_stats']['backbone']['bn1']['mean']"]
    )
    assert not np.array_equal(statistics, state["['batch_stats']['backbone']['bn1']['mean']"])
