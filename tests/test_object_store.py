"""Runs whose workdir and records are in an object store, on servers of this machine."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from etils import epath

import layouts
from object_store import GCS, S3, download, serving, url
from runs import SMALL, command, environment, free_port, run, saved_state, tiny_config

pytestmark = pytest.mark.object_store

RUN = {**SMALL, "train__steps": 8, "train__eval_every": 4, "optimizer__ema_decay": 0.9}
COMPLETE = "commit_success.txt"


@pytest.fixture(scope="module")
def s3():
    with serving(S3) as store:
        yield store


@pytest.fixture(scope="module")
def gcs():
    with serving(GCS) as store:
        yield store


@pytest.fixture(autouse=True)
def no_fault(request):
    yield
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3").fault = lambda method, path: None


@pytest.fixture(scope="module")
def data(s3, scenes_dir, tmp_path_factory):
    """The scenes in the store, uploaded by `prepare`; where they were prepared is gone."""
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(scenes_dir, cache / "prepared")
    arguments = ["--dataset=scenes", f"--data_dir={url(s3, 'data')}"]
    program = [sys.executable, "-m", "duc_dlc_jax.data.prepare", *arguments]
    run(program, DUC_DLC_CACHE=str(cache), **s3.env)
    assert not (cache / "prepared" / "scenes" / "2.0.0").exists()
    again = run(program, DUC_DLC_CACHE=str(cache), **s3.env)
    assert "already prepared" in again.stdout
    return url(s3, "data")


@pytest.fixture(scope="module")
def straight(scenes_dir, tmp_path_factory):
    """The same run on a disk, left alone."""
    workdir = tmp_path_factory.mktemp("straight")
    run(command(scenes_dir, workdir, **RUN))
    return workdir


def start(arguments, log, **env):
    with open(log, "w") as file:
        return subprocess.Popen(arguments, env=environment(1, **env), stdout=file, stderr=file)


def wait_for(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_same_state(straight, store, workdir, step, folder):
    copy = download(store, f"{workdir}/checkpoints/{step}", folder / f"checkpoints/{step}")
    first, second = saved_state(straight, step), saved_state(copy.parent.parent, step)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def lines(store, name):
    return [json.loads(line) for line in store.read(name).decode().splitlines()]


def complete_steps(store, workdir):
    found = [name.split("/") for name in store.names(f"{workdir}/checkpoints/")]
    return sorted(int(parts[2]) for parts in found if parts[3:] == [COMPLETE])


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_save_kill_resume_evaluate(scheme, s3, request, data, scenes_dir, straight, tmp_path):
    """Killed while it saves step 4 or just after; the rest equals the run on a disk bit for bit."""
    store = s3 if scheme == "s3" else request.getfixturevalue("gcs")
    workdir = url(store, "run")
    env = store.env | {"DUC_DLC_CACHE": str(tmp_path / "cache")}
    if scheme == "s3":
        env["JAX_COMPILATION_CACHE_DIR"] = ""  # beside the checkpoints
    arguments = command(data if scheme == "s3" else scenes_dir, workdir, **RUN)
    process = start(arguments, tmp_path / "log", **env)
    wait_for(lambda: any("/checkpoints/4/" in name for name in store.names("run/")), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert set(complete_steps(store, "run")) in ({2}, {2, 4})
    run(arguments, tensorflow=True, **env)
    assert_same_state(straight, store, "run", 8, tmp_path / "copy")
    assert not [
        name
        for name in store.names("run/")
        if name.split("/")[1] == "checkpoints"
        and int(name.split("/")[2]) not in complete_steps(store, "run")
    ]
    here, there = (
        {line["step"]: line["val/mIoU"] for line in found if "val/mIoU" in line}
        for found in (
            [json.loads(s) for s in (straight / "metrics.jsonl").read_text().splitlines()],
            lines(store, "run/metrics.jsonl"),
        )
    )
    assert here == there
    kinds = ["config.json", "labels.json", "goodput.jsonl", "events.out.tf", "pictures/step-8/"]
    for kind in [*kinds, "compiled/jit_train_step"][: 6 if scheme == "s3" else 5]:
        assert any(name.startswith(f"run/{kind}") for name in store.names("run/")), kind
    program = [sys.executable, "-m", "duc_dlc_jax.evaluate", f"--workdir={workdir}"]
    json_file = tmp_path / "scores.json"
    run([*program, "--checkpoint=latest", f"--json={json_file}"], **env)
    scores = json.loads(json_file.read_text())
    assert (scores["step"], scores["mIoU"]) == (8, pytest.approx(there[8], abs=1e-6))


def test_an_imported_network_labels_for_a_server(s3, tmp_path):
    """`import_model` and `submit` with a workdir in the store, beside the same on a disk."""
    import references  # needs torch
    from duc_dlc_jax import import_model
    from duc_dlc_jax.data.prepare import prepare

    references.torch.save(references.deeplab(14, classes=19)[1], tmp_path / "deeplab.pth")
    layouts.cityscapes(tmp_path / "raw")
    prepare("cityscapes", str(tmp_path / "raw"), tmp_path / "data")
    workdir, archives = url(s3, "imported"), [tmp_path / "0.zip", tmp_path / "1.zip"]
    network = {"name": str(tmp_path / "deeplab.pth"), "labels": "cityscapes"}
    submit = ["-m", "duc_dlc_jax.submit", f"--data_dir={tmp_path / 'data'}", "--split=val"]
    program = [sys.executable, "-m", "duc_dlc_jax.import_model", f"--workdir={workdir}"]
    run([*program, f"--weights={network['name']}", "--labels=cityscapes"], **s3.env)
    import_model.import_model(workdir=epath.Path(tmp_path / "imported"), **network)
    for place, archive, env in (
        (workdir, archives[0], s3.env),
        (tmp_path / "imported", archives[1], {}),
    ):
        run([sys.executable, *submit, f"--workdir={place}", f"--output={archive}"], **env)
    refused = run(
        [sys.executable, *submit, f"--workdir={workdir}", f"--output={url(s3, 'x.zip')}"],
        check=False,
        **s3.env,
    )
    assert refused.returncode == 2
    assert "must be on a disk" in refused.stderr
    again = run([*program, f"--weights={network['name']}"], check=False, **s3.env)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    here, there = map(contents, archives)
    assert list(here) == ["ulm_000001_000002_labelIds.png"]
    assert here == there


def contents(archive):
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_an_incomplete_checkpoint_is_not_read(s3, data, scenes_dir, tmp_path):
    """Without its marker a step is none; with a flipped byte it is set aside; the rest is used."""
    workdir = url(s3, "incomplete")
    env = s3.env | {"DUC_DLC_CACHE": str(tmp_path)}
    arguments = command(scenes_dir, workdir, **RUN, train__keep_latest=4)
    run(arguments, **env)
    assert complete_steps(s3, "incomplete") == [2, 4, 6, 8]
    s3.delete(f"incomplete/checkpoints/8/{COMPLETE}")
    program = [sys.executable, "-m", "duc_dlc_jax.evaluate", f"--workdir={workdir}"]
    result = run([*program, "--checkpoint=latest", f"--data_dir={data}"], **env)
    assert "checkpoint of step 6" in result.stdout
    missing = run([*program, "--checkpoint=8"], check=False, **env)
    assert missing.returncode == 2
    assert "no checkpoint of step 8" in missing.stderr
    arrays = [n for n in s3.names("incomplete/checkpoints/6/state/") if "ocdbt.process_0/d/" in n]
    largest = max(arrays, key=lambda name: len(s3.read(name)))
    content = bytearray(s3.read(largest))
    content[len(content) // 2] ^= 1
    s3.write(largest, bytes(content))
    resumed = run(arguments, **env)
    assert "resuming from step 4" in resumed.stderr
    assert "checkpoints/6 is damaged" in resumed.stderr
    assert s3.names("incomplete/unreadable/6/")
    assert complete_steps(s3, "incomplete") == [2, 4, 6, 8]


@pytest.mark.parametrize("fault", [403, 503, "gone"])
def test_a_failing_upload(fault, s3, scenes_dir, straight, tmp_path):
    """The save of step 4 fails for good: code 4, step 2 stays; later the same command goes on.

    The last time through an outage that its retries outlast, which costs nothing.
    """
    name = f"failing-{fault}"
    arguments = command(scenes_dir, url(s3, name), **RUN)

    def failing(method, path):
        if method in ("PUT", "POST") and f"/{name}/checkpoints/4/" in path:
            if fault != "gone":
                return fault
            gone.append(path)
        return None

    gone, s3.fault = [], failing
    env = s3.env | {"DUC_DLC_STORE_RETRIES": "2"}
    process = start(arguments, tmp_path / "log", **env)
    if fault == "gone":
        wait_for(lambda: gone, process)
        s3.stop()
    code = process.wait(timeout=600)
    if fault == "gone":
        s3.start()
    text = (tmp_path / "log").read_text()
    assert code == 4, text[-3000:]
    assert f"a checkpoint cannot be written to {url(s3, name)}/checkpoints" in text
    assert complete_steps(s3, name) == [2]
    if fault == "gone":
        failed = []

        def short(method, path):
            if method == "PUT" and f"/{name}/checkpoints/4/state" in path and len(failed) < 3:
                failed.append(path)
                return 503
            return None

        s3.fault = short
        run(arguments, **s3.env)
        assert len(failed) == 3
        assert_same_state(straight, s3, name, 8, tmp_path / "copy")


def test_a_store_that_cannot_be_used_ends_before_compilation(s3, scenes_dir, tmp_path):
    def code_and_error(workdir, **env):
        result = run(command(scenes_dir, workdir), check=False, **s3.env | env)
        assert "compiled" not in result.stdout
        return result.returncode, result.stderr.splitlines()[-1]

    code, error = code_and_error("s3://nothing-here/run")
    assert (code, "there is no bucket s3://nothing-here" in error) == (2, True), error
    s3.fault = lambda method, path: 403 if method == "PUT" else None
    code, error = code_and_error(url(s3, "refused"))
    assert (code, "refuses access" in error) == (2, True), error


def test_two_processes_share_one_workdir_and_one_copy(s3, data, tmp_path):
    """Of one run, on one machine; then one process goes on."""
    cache, port = tmp_path / "cache", free_port()
    env = s3.env | {"DUC_DLC_CACHE": str(cache)}
    arguments = command(data, url(s3, "two"), **RUN | {"train__steps": 4})
    flags = [f"--coordinator=localhost:{port}", "--processes=2"]
    s3.requests.clear()
    processes = [
        start([*arguments, *flags, f"--process={i}"], tmp_path / f"log{i}", **env) for i in range(2)
    ]
    codes = [process.wait(timeout=600) for process in processes]
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert complete_steps(s3, "two") == [2, 4]
    fetched = [path for method, path in s3.requests if method == "GET" and "array_record" in path]
    assert 0 < len(fetched) < 8  # 27 MB and 5 MB in blocks of 8 MiB, once
    assert not list(cache.rglob("*.part"))
    resumed = run([*arguments, "--config.train.steps=8"], **env)
    assert "resuming from step 4" in resumed.stderr
    assert complete_steps(s3, "two") == [6, 8]


# Staging, in this process.


@pytest.fixture
def staged(s3, data, tmp_path, monkeypatch):
    """Opens the validation records of the store through `tmp_path`."""
    from duc_dlc_jax.data import records

    for name, value in (s3.env | {"EPATH_USE_TF": "false"}).items():
        monkeypatch.setenv(name, value)
    config = tiny_config(data, data__staging_dir=str(tmp_path / "copies")).data

    def opened():
        return records.open_records(config, "val")

    return opened


def shard(s3):
    return next(name for name in s3.names("data/") if "val.array_record" in name)


def copy_of(tmp_path, name):
    (found,) = (tmp_path / "copies").rglob(pathlib.PurePosixPath(name).name)
    return found


def test_records_are_copied_once_and_are_the_same(s3, staged, scenes_dir, tmp_path, capfd):
    from duc_dlc_jax.data import records

    first = staged()
    assert "records of scenes: MB 6/6" in capfd.readouterr().err
    expected = records.open_records(tiny_config(scenes_dir).data, "val")
    assert len(first) == len(expected) == 40
    for index in (0, 39):
        np.testing.assert_array_equal(first[index]["image"], expected[index]["image"])
        np.testing.assert_array_equal(first[index]["label"], expected[index]["label"])
    assert not list((tmp_path / "copies").rglob("*train*"))
    s3.requests.clear()
    staged()
    assert not [path for _, path in s3.requests if "array_record" in path]


def test_a_copy_that_was_broken_off_goes_on(s3, staged, tmp_path):
    staged()
    path = copy_of(tmp_path, shard(s3))
    content = path.read_bytes()
    path.unlink()
    part = path.with_name(path.name + ".part")
    part.write_bytes(content[:4_000_000])
    asked, s3.requests = s3.requests, []
    staged()
    assert asked
    assert path.read_bytes() == content
    part.write_bytes(b"x" + content[1:4_000_000])  # and one that was broken
    path.unlink()
    staged()
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_copy_is_fetched_again(damage, s3, staged, tmp_path):
    staged()
    path = copy_of(tmp_path, shard(s3))
    content = path.read_bytes()
    changed = content[:-5] if damage == "truncated" else content[:99] + b"?" + content[100:]
    path.write_bytes(changed)
    staged()
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_object_is_named(damage, s3, staged, tmp_path):
    from duc_dlc_jax.data.labels import DataError

    name = shard(s3)
    content = s3.read(name)
    try:
        s3.delete(name)
        if damage != "missing":
            changed = content[:-5] if damage == "truncated" else b"?" + content[1:]
            s3.write(name, changed)
        with pytest.raises(DataError, match=pathlib.PurePosixPath(name).name):
            staged()
        assert not list((tmp_path / "copies").rglob("*val.array_record-00000-of-00001"))
    finally:
        s3.write(name, content)
    assert len(staged()) == 40


def test_a_full_disk_is_one_sentence(staged, monkeypatch):
    from duc_dlc_jax.data import staging
    from duc_dlc_jax.data.labels import DataError

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"5 MiB are needed, 0 MiB are free. Make room, or set"):
        staged()


def test_records_without_a_manifest_say_what_to_do(s3, staged):
    manifest = next(name for name in s3.names("data/") if name.endswith("manifest.json"))
    content = s3.read(manifest)
    s3.delete(manifest)
    try:
        with pytest.raises(FileNotFoundError, match=r"repeat `prepare`"):
            staged()
    finally:
        s3.write(manifest, content)
