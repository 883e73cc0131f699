"""Tensors from .pth files: both of PyTorch's formats, and that nothing of a file's code runs."""

import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from duc_dlc_jax.models import tensor_files
from weight_files import Call, file_tensors, stream, write


def write_pickle(path, content: bytes, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", content)
        for key, data in storages:
            archive.writestr(f"w/data/{key}", data)
    return path


HOSTILE = pytest.mark.parametrize("function", [os.system, eval, getattr, pathlib.Path, np.zeros])


@HOSTILE
def test_hostile_pickle_runs_nothing(tmp_path, function, capfd):
    path = write_pickle(tmp_path / "w.pth", pickle.dumps({"a": Call(function, "echo run")}))
    with pytest.raises(ValueError, match="nothing of it was run"):
        tensor_files.read_tensors(path)
    assert capfd.readouterr().out == ""


@HOSTILE
@pytest.mark.parametrize("place", ["magic", "system", "content", "keys"])
def test_hostile_pickles_before_the_zip_format_run_nothing(tmp_path, function, place, capfd):
    call = Call(function, "echo run")
    content = pickle.dumps({"a": call} if place == "content" else {}, 2)
    parts = {"magic": call} if place == "magic" else {"system": call} if place == "system" else {}
    path = tmp_path / "w.pth"
    path.write_bytes(stream(content=content, keys=[call] if place == "keys" else [], **parts))
    with pytest.raises(ValueError, match="nothing of it was run"):
        tensor_files.read_tensors(path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride", "given", "message"),
    [
        (6, 1, (2, 2), (3, 1), 6, None),
        (6, 3, (2, 2), (3, 1), 6, "beyond its storage"),
        (10**12, 0, (2,), (1,), 6, "larger than the file"),
        (6, 0, (2,), (1,), 5, "has 24 of 24 bytes|has 20 of 24 bytes"),
    ],
)
def test_tensors_before_the_zip_format(tmp_path, count, offset, size, stride, given, message):
    for little in (True, False):
        data = np.arange(given, dtype="<f4" if little else ">f4").tobytes()
        storages = given.to_bytes(8, "little" if little else "big") + data
        content = _pickled_tensor("FloatStorage", "0", count, offset, size, stride)
        system = {"little_endian": little}
        path = tmp_path / "w.pth"
        path.write_bytes(stream(system=system, content=content, keys=["0"], storages=storages))
        if message:
            with pytest.raises(ValueError, match=message):
                tensor_files.read_tensors(path)
        else:
            np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [[1, 2], [4, 5]])


@pytest.mark.parametrize("before", [(), (tensor_files.MAGIC,), (tensor_files.MAGIC, 1001)])
def test_a_tensor_outside_the_state_dict_is_refused(tmp_path, before):
    """As the first pickle of the file, or in place of its version or of the system it is from."""
    tensor = _pickled_tensor("FloatStorage", "0", 1, 0, (1,), (1,))
    path = tmp_path / "w.pth"
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in before) + tensor)
    with pytest.raises(ValueError, match="tensors: storage 0 is outside the state dict"):
        tensor_files.read_tensors(path)


def test_a_truncated_pth_is_refused(tmp_path):
    for name, reason in (("w.pth", "truncated: the end of the archive"), ("old.pth", "storage")):
        path = write(tmp_path / name, file_tensors())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"not a state dict of plain tensors: {reason}"):
            tensor_files.read_tensors(path)


def _pickled_tensor(storage: str, key: str, count: int, offset: int, size, stride) -> bytes:
    """A protocol-2 pickle of {"a": tensor}, as torch.save writes it, from any numbers."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value):
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    record = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu")
    record += number(count) + b"tQ"
    args = record + number(offset) + numbers(size) + numbers(stride) + b"\x89" + b"N" + b"t"
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"Rs."


@pytest.mark.parametrize(
    ("count", "offset", "size", "stride", "message"),
    [
        (6, 1, (2, 2), (3, 1), None),
        (6, 3, (2, 2), (3, 1), "beyond its storage"),
        (6, 0, (10**9, 10**6), (0, 0), "exceeds its storage"),
        (6, -1, (2,), (1,), "beyond its storage"),
        (6, 5, (2,), (-1,), "beyond its storage"),
        (9, 0, (2,), (1,), "has 24 bytes, 9 x float32 need 36"),
    ],
)
def test_pth_views_stay_within_their_storage(tmp_path, count, offset, size, stride, message):
    data = np.arange(6, dtype="<f4")
    content = _pickled_tensor("FloatStorage", "0", count, offset, size, stride)
    path = write_pickle(tmp_path / "w.pth", content, [("0", data.tobytes())])
    if message:
        with pytest.raises(ValueError, match=message):
            tensor_files.read_tensors(path)
    else:
        np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [[1, 2], [4, 5]])


def test_big_endian_pth(tmp_path):
    content = _pickled_tensor("FloatStorage", "0", 3, 0, (3,), (1,))
    path = write_pickle(tmp_path / "w.pth", content, [("0", np.arange(3, dtype=">f4").tobytes())])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/byteorder", "big")
    np.testing.assert_array_equal(tensor_files.read_tensors(path)["a"], [0, 1, 2])


def test_pth_of_every_dtype_views_and_wrappers(tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .pth needs torch; reading does not")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "half": whole.half(),
        "bfloat": whole.bfloat16(),
        "double": whole.double(),
        "long": torch.tensor(3),
        "bool": whole > 3,
        "view": whole[1:3, ::2].T,
        "parameter": torch.nn.Parameter(whole),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "state_dict": state}, path)
    read = tensor_files.read_tensors(path)
    assert set(read) == set(state)
    for name, value in state.items():
        expected = value.detach()
        if name == "bfloat":
            expected = expected.float()
        np.testing.assert_array_equal(read[name].astype(expected.numpy().dtype), expected.numpy())
    module = torch.nn.Conv2d(3, 4, 1)
    torch.save(module.state_dict(), path)  # an OrderedDict with _metadata
    assert set(tensor_files.read_tensors(path)) == {"weight", "bias"}
    torch.save(module, path)  # a pickled module needs its class
    with pytest.raises(ValueError, match=r"Conv2d, which is not a tensor.*torch\.save\(check"):
        tensor_files.read_tensors(path)


def test_a_state_dict_beside_other_things(tmp_path):
    torch = pytest.importorskip("torch", reason="writing a .pth needs torch; reading does not")
    ours, other = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    optimizer = {"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    path = tmp_path / "w.ckpt"
    for content in (
        {"net": ours},
        {"model_state_dict": ours, "optimizer": optimizer, "epoch": 3, "loss": torch.zeros(())},
        {"ema": other, "model": ours},
        {"model": other, "state_dict": ours},
        {"state_dict": {"model": ours}, "optimizer": optimizer, "epoch": 3},
    ):
        torch.save(content, path)
        np.testing.assert_array_equal(tensor_files.read_tensors(path)["w"], [1, 1])
    for content, message in (
        ({"net": ours, "ema": other}, r"holds tensors under net, ema\. Save those"),
        ({"nets": {"a": ours, "b": other}}, r"holds tensors under nets\.a, nets\.b\. Save those"),
        ({"epoch": 3, "args": {"lr": 1}}, r"no state dict, and no tensor; its keys: epoch, args"),
        ({}, "its keys: nothing"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            tensor_files.read_tensors(path)


def test_legacy_pth_says_how_to_convert(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match=r"torch\.save\(torch\.load\("):
        tensor_files.read_tensors(path)
