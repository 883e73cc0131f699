"""Paths in object stores, as far as no server is needed: see test_object_store.py for the rest."""

import collections
import importlib.util
import json
import sys

import numpy as np
import pytest
from absl import flags
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from duc_dlc_jax import evaluate, fit, predict, s3_arrays, storage, submit, writers
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import staging
from duc_dlc_jax.data.labels import DataError
from duc_dlc_jax.export import __main__ as export
from duc_dlc_jax.paper import __main__ as paper


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_says_how_to_install_it(scheme, package, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == package else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(storage.importlib.util, "find_spec", hidden)
    storage._use_fsspec.cache_clear()
    with pytest.raises(ConfigError, match=rf"{package}: pip install 'duc-dlc-jax\[cloud\]'"):
        storage.path(f"{scheme}://bucket/run")


def test_other_stores_and_flags_that_need_a_disk_are_refused():
    with pytest.raises(ConfigError, match=r"az://.*allowed: s3://BUCKET, gs://BUCKET"):
        storage.path("az://container/run")
    with pytest.raises(ConfigError, match=r"--output=s3://bucket/x must be on a disk"):
        storage.local("--output", "s3://bucket/x")
    assert storage.local("--output", "results") == epath.Path("results")


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    """The superuser's rights hide permissions; /proc takes no files from him either."""
    file = tmp_path / "file"
    file.write_text("")
    for path, is_file, reason in (
        (file, False, "is a file; give another path"),
        (tmp_path, True, "is a folder; give another path"),
        (file / "deep" / "run", False, rf"no file can be written in {file} \(Not a directory\)"),
        (file / "scores.json", True, rf"no file can be written in {file} \(Not a directory\)"),
        ("/proc/run", False, r"no file can be written in /proc \("),
    ):
        with pytest.raises(ConfigError, match=f"--output={path} .*{reason}"):
            storage.check(path, write=True, flag="--output", file=is_file)
    storage.check(file, write=True, flag="--output", file=True)
    storage.check(tmp_path / "new" / "run", write=True)
    assert list(tmp_path.iterdir()) == [file]
    storage.check("/proc/run")
    storage.write_text(tmp_path / "new" / "scores.json", "{}")


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        (evaluate, "json"),
        (evaluate, "report"),
        (predict, "output"),
        (submit, "output"),
        (fit, "workdir"),
        (paper, "output"),
        (export, "output"),
    ],
)
def test_commands_look_at_their_outputs_first(module, flag, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    given = {"workdir": "none", "input": ["none"], "format": ["onnx"], "size": "dynamic"}
    args = collections.defaultdict(str, given | {flag: str(tmp_path / "file" / "x")})

    class Flags:
        __getattr__ = __getitem__ = lambda self, name: args[name]

    monkeypatch.setattr(flags, "FLAGS", Flags())
    monkeypatch.setattr(fit, "_request", lambda args: None)
    with pytest.raises(ConfigError, match=rf"--{flag}=.*/file/x cannot be written"):
        module.main([])


def test_two_processes_may_write_one_file(tmp_path):
    path = tmp_path / "new" / "grid.json"
    with storage.whole_file(path) as partial:
        partial.write_text("one")
        other = path.with_name(f"{path.name}.elsewhere-1.partial")
        other.write_text("two")
        other.replace(path)
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_broken_off_leaves_the_one_before(tmp_path):
    path = tmp_path / "model.npz"
    path.write_text("before")

    def write():
        with storage.whole_file(path) as partial:
            partial.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_orbax_describes_s3_to_tensorstore(monkeypatch):
    """Also the layers of OCDBT; what lies on a disk or in gs:// is described as before."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv(s3_arrays.RETRIES, "3")
    s3_arrays.enable()
    s3_arrays.enable()
    build = tensorstore_utils.build_kvstore_tspec
    retries = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "16s"}
    expected = {
        "driver": "s3",
        "bucket": "bucket",
        "path": "run/checkpoints/4/state",
        "endpoint": "http://localhost:9000",
        "aws_region": "eu-west-1",
        "s3_request_retries": retries,
    }
    assert build("s3://bucket/run/checkpoints/4/state", use_ocdbt=False) == expected
    layered = build("s3://bucket/run/checkpoints/4/state", "params", use_ocdbt=True)
    assert (layered["driver"], layered["base"], layered["path"]) == ("ocdbt", expected, "params")
    google = build("gs://bucket/run", use_ocdbt=False)
    assert google == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "run",
        "gcs_request_retries": retries,
    }
    assert build("/disk/run", use_ocdbt=False) == {"driver": "file", "path": "/disk/run"}


def test_what_is_the_store_s_fault():
    assert storage.is_trouble(ValueError("UNAVAILABLE: Error reading x"))
    assert storage.is_trouble(PermissionError("Forbidden"))
    assert not storage.is_trouble(ValueError("DATA_LOSS: Error decoding x"))


def test_lines_grow_on_a_disk(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    lines = storage.Lines(path, ["old"])
    lines.write("new")
    assert path.read_text() == "old\nnew\n"
    lines.close()
    more = storage.Lines(path)
    more.write("newer")
    more.close()
    assert storage.read(path) == "old\nnew\nnewer\n"
    assert storage.read(epath.Path(tmp_path) / "nothing") == ""


def test_a_run_goes_on_after_a_line_that_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clu", None)  # no events
    lines = [{"step": 2, "x": 0.1}, {"step": 4, "x": None}, {"step": 6, "x": 1e-30}]
    path = epath.Path(tmp_path) / "metrics.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"step": 8, "y": {"z": 1}')
    assert storage.json_lines(storage.read(path)) == lines
    assert storage.json_lines("") == []
    writers.Writer(path.parent, 4).close()
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:2])


def test_manifests(tmp_path):
    (tmp_path / "mine-train.array_record-00000-of-00001").write_bytes(b"records")
    (tmp_path / "summary.json").write_text("{}")
    files = staging.write_manifest(tmp_path)
    assert files == staging.write_manifest(tmp_path) == staging.read_manifest(epath.Path(tmp_path))
    assert files["summary.json"]["size"] == 2
    assert set(files) == {"mine-train.array_record-00000-of-00001", "summary.json"}
    (tmp_path / staging.MANIFEST).write_text(json.dumps({"summary.json": 2}))
    with pytest.raises(DataError, match="is no manifest"):
        staging.read_manifest(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("file", "needed"),
    [
        ("my-set-val.array_record-00000-of-00002", True),
        ("my-set-train.array_record-00000-of-00001", False),
        ("my-set-train_extra.array_record-00000-of-00001", False),
        ("index-val.npz", True),
        ("index-train.npz", False),
        ("features.json", True),
    ],
)
def test_only_the_files_of_a_split_are_needed(file, needed):
    assert bool(staging._pattern("my-set", ["val"]).fullmatch(file)) == needed


def test_events_of_a_long_run_are_not_uploaded_over_and_over(tmp_path, monkeypatch):
    """An object store replaces whole files: of one file eight flushes would send 4.5 times it."""
    tf = pytest.importorskip("tensorflow", reason="TensorBoard's events need TensorFlow")
    sent = collections.Counter()

    class Counted(type(epath.Path(tmp_path))):
        def write_bytes(self, data):
            sent[self.name] += len(data)
            return super().write_bytes(data)

    monkeypatch.setattr(writers.storage, "is_remote", lambda path: True)
    monkeypatch.setattr(writers, "EVENTS_BYTES", 100_000)
    events = writers._Events(Counted(tmp_path))
    for step in range(8):
        image = np.random.default_rng(step).integers(0, 256, (1, 128, 128, 3), np.uint8)
        events.writer.write_images(step, {"noise": image})
        events.flush()
    events.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    stored = sum(file.stat().st_size for file in files)
    assert stored <= sum(sent.values()) < 2.5 * stored
    found = [e.step for f in files for e in tf.compat.v1.train.summary_iterator(str(f)) if e.step]
    assert sorted(set(found)) == list(range(1, 8))
