"""Batches are a function of (seed, step): processes, workers and resumption change nothing."""

import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from duc_dlc_jax import config as configuration
from duc_dlc_jax.data import pipeline
from duc_dlc_jax.data.records import Records, open_records

COUNT = 40  # records of the val split of the scenes


def config(folder, **changes):
    data: Any = configuration.default().data
    data.update({"name": "scenes", "dir": str(folder), "base_size": 48, "crop_size": 32})
    data.update(changes)
    return data


@pytest.fixture(scope="module")
def records(scenes_dir):
    return open_records(config(scenes_dir, in_memory=True), "val")


def iterator(records, steps=3, batch=6, seed=0, **options):
    fields = ("workers", "threads", "bad_records", "class_uniform_share")
    changes = {k: options.pop(k) for k in fields if k in options}
    return pipeline.train_iterator(
        config(records.folder.parent.parent, **changes),
        records,
        seed=seed,
        batch_size=batch,
        steps=steps,
        **options,
    )


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_shapes_and_dtypes(records):
    batches = list(iterator(records))
    assert len(batches) == 3
    shapes = {k: (v.shape, v.dtype.name) for k, v in batches[0].items()}
    assert shapes == {
        "image": ((6, 32, 32, 3), "uint8"),
        "label": ((6, 32, 32), "uint8"),
        "valid": ((6, 2), "int32"),
        "record": ((6,), "int32"),
        "bad": ((6,), "bool"),
    }


def test_each_record_once_per_epoch_across_borders(records):
    order = np.concatenate([b["record"] for b in iterator(records, steps=20)])
    assert len(order) == 3 * COUNT  # 40 does not divide by 6: batches run across the border
    epochs = order.reshape(3, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[0] != np.arange(COUNT)).any()


def test_a_record_is_augmented_anew_in_each_epoch(records):
    rows = [
        (record, image)
        for batch in iterator(records, steps=20)
        for record, image in zip(batch["record"], batch["image"], strict=True)
    ]
    seen = [image for record, image in rows if record == 0]
    assert len(seen) == 3
    assert (seen[0] != seen[1]).any()
    assert (seen[1] != seen[2]).any()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_see_the_batches_of_one(records, processes):
    alone = list(iterator(records, steps=8))
    parts = [
        list(iterator(records, steps=8, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, alone)


def test_threads_change_nothing_and_seeds_change_everything(records):
    one = list(iterator(records, threads=1))
    assert_equal(list(iterator(records, threads=4)), one)
    other = list(iterator(records, seed=1))
    assert (one[0]["record"] != other[0]["record"]).any()


def test_state_resumes_at_the_next_batch(records):
    expected = list(iterator(records, steps=9))
    first = iterator(records, steps=9)
    for _ in range(4):
        next(first)
    second = iterator(records, steps=9)
    next(second)  # elsewhere
    second.set_state(first.get_state())
    assert_equal(list(second), expected[4:])
    assert_equal(list(iterator(records, steps=9, start_step=4)), expected[4:])


def test_grain_checkpoints_save_and_restore_it(records, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    expected = list(iterator(records, steps=6))
    saved = iterator(records, steps=6)
    next(saved)
    next(saved)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(saved)))
        manager.wait_until_finished()
        fresh = iterator(records, steps=6)
        arguments = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
        restored = manager.restore(2, args=arguments)["data"]
    assert_equal(list(restored), expected[2:])


# The start of a program whose worker processes import it anew.
PROGRAM = """
import os, signal, sys
import numpy as np
from duc_dlc_jax import config
from duc_dlc_jax.data import pipeline, records

def opened():
    data = config.default().data
    data.update({{"name": "scenes", "dir": {folder!r}, "base_size": 48, "crop_size": 32}})
    return data, records.open_records(data, "val")

OPTIONS = dict(seed=0, batch_size=6, steps=7)
"""


def run_program(scenes_dir, tmp_path, text):
    """Runs a program from a file, which the worker processes import; returns what it printed."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(folder=str(scenes_dir)) + text)
    root = str(pathlib.Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "leaked shared_memory" not in done.stderr
    return done.stdout


# grain's thread comes too late when the process ends at once.
SLOW_TO_FREE = """
import time
from grain._src.python.ipc import shared_memory_array
free = shared_memory_array._del_shm
shared_memory_array._del_shm = lambda *args, **named: (time.sleep(0.01), free(*args, **named))
"""


def test_worker_processes_change_nothing_also_after_a_resumption(scenes_dir, tmp_path):
    program = """
if __name__ == "__main__":
    data, val = opened()
    alone = list(pipeline.train_iterator(data, val, **OPTIONS))
    data.workers = 2
    iterator = pipeline.train_iterator(data, val, **OPTIONS)
    for number, expected in enumerate(alone):
        found = next(iterator)
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])
        if number == 2:  # in the middle of an epoch: batches are ahead in the workers
            state = iterator.get_state()
            iterator.close()
            iterator = pipeline.train_iterator(data, val, **OPTIONS)
            iterator.set_state(state)
    iterator.close()
    del iterator, found
    pipeline.free_shared_memory()
"""
    run_program(scenes_dir, tmp_path, SLOW_TO_FREE + program)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError('x')"])
def test_a_worker_that_ends_badly_names_its_record(scenes_dir, tmp_path, end):
    program = f"""
original = pipeline.train_transform

def ending(read, size, rng, augmentation, focus):
    if size == (11, 11):
        {end}
    return original(read, size, rng, augmentation, focus)

pipeline.train_transform = ending
sizes = records.Records.size
records.Records.size = lambda self, index: (11, 11) if index == 11 else sizes(self, index)

if __name__ == "__main__":
    data, val = opened()
    data.workers = 2
    iterator = pipeline.train_iterator(data, val, **OPTIONS)
    try:
        list(iterator)
    except Exception as error:
        print(pipeline.with_record(error, val))
        iterator.close()
"""
    printed = run_program(scenes_dir, tmp_path, program)
    assert "record 11" in printed
    assert ("val_0011" in printed) == ("KILL" in end)


def test_records_pickle_without_their_files_and_cache(records):
    records[0]
    twin = pickle.loads(pickle.dumps(records))
    assert len(pickle.dumps(records)) < 5000
    assert not twin._cache
    np.testing.assert_array_equal(twin[3]["image"], records[3]["image"])
    assert twin.spec == records.spec


def test_memory_keeps_the_decoded_arrays(scenes_dir, records):
    assert np.shares_memory(records[5]["image"], records[5]["image"])
    plain = open_records(config(scenes_dir), "val")
    assert not np.shares_memory(plain[5]["image"], plain[5]["image"])


def test_evaluation_sees_every_record_once_over_processes(records):
    names = [
        [e["name"] for e in pipeline.eval_examples(records, process_index=p, process_count=3)]
        for p in range(3)
    ]
    assert [len(n) for n in names] == [14, 13, 13]
    assert names[1][:2] == ["val_0001", "val_0004"]
    assert sorted(n for part in names for n in part) == [f"val_{i:04d}" for i in range(COUNT)]
    assert list(pipeline.eval_examples(records, process_index=50, process_count=60)) == []


class Broken:
    """A source of records of which one holds no image."""

    def __init__(self, records, number):
        self._source, self._number = records._opened()[0]._source, number

    def __getitem__(self, index):
        broken = {"image": b"broken", "encoding": b"png"}
        return self._source[index] | (broken if index == self._number else {})


@pytest.fixture
def broken(records):
    """The val records with an unreadable record 7."""
    copy = Records(records.folder, "val")
    copy._opened()[0]._source = Broken(records, 7)
    return copy


def test_a_failing_record_is_named(broken):
    message = r"record 7 of .*scenes.*val: val_0007: 6 bytes"
    with pytest.raises(RuntimeError, match=message):
        list(iterator(broken, steps=7))
    with pytest.raises(RuntimeError, match="record 7 of"):
        list(pipeline.eval_examples(broken))


def test_a_bad_record_can_be_masked_in_its_own_place(records, broken):
    good = list(iterator(records, steps=7))
    found = list(iterator(broken, steps=7, bad_records="mask"))
    rows = bad = 0
    for a, b in zip(good, found, strict=True):
        np.testing.assert_array_equal(a["record"], b["record"])
        for i, record in enumerate(a["record"]):
            rows += 1
            assert b["bad"][i] == (record == 7)
            if record == 7:
                bad += 1
                assert (b["label"][i] == 255).all()
                assert (b["image"][i] == 0).all()
            else:
                np.testing.assert_array_equal(a["image"][i], b["image"][i])
                np.testing.assert_array_equal(a["label"][i], b["label"][i])
    assert (rows, bad) == (42, 1)


def test_class_uniform_sampling_shows_rare_classes(records):
    share = {}
    for uniform in (0.0, 1.0):
        batches = iterator(records, steps=30, class_uniform_share=uniform)
        labels = np.concatenate([b["label"] for b in batches])
        share[uniform] = np.bincount(labels.ravel(), minlength=8)[:8] / labels.size
    assert share[0.0].argsort()[:2].tolist() == [7, 6]  # signs and poles are rarest
    assert (share[1.0][[6, 7]] > 1.1 * share[0.0][[6, 7]]).all()


def test_class_uniform_crops_hold_their_class_and_every_class_comes(records):
    points = records.class_points()
    sampler = pipeline.ClassUniform(points, 1.0, seed=0)
    drawn = [sampler.draw(position) for position in range(400)]
    assert drawn == [sampler.draw(position) for position in range(400)]
    classes = [records[record]["label"][y, x] for record, (y, x) in drawn]
    counts = np.bincount(classes, minlength=8)
    assert counts.min() > 25  # 50 expected of each of 8
    half = pipeline.ClassUniform(points, 0.5, seed=0)
    assert 150 < sum(half.draw(position) is not None for position in range(400)) < 250


def test_class_uniform_batches_do_not_depend_on_processes_or_resumption(records):
    options = dict(steps=4, class_uniform_share=0.7)
    alone = list(iterator(records, **options))
    parts = [list(iterator(records, process_index=p, process_count=2, **options)) for p in range(2)]
    for step, expected in enumerate(alone):
        for key in expected:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, expected[key])
    assert_equal(list(iterator(records, start_step=2, **options)), alone[2:])


def test_joined_splits_follow_one_another(scenes_dir, records):
    joined = open_records(config(scenes_dir), "train+val")
    assert len(joined) == 240
    assert joined[203]["name"] == "val_0003"
    np.testing.assert_array_equal(joined[203]["image"], records[3]["image"])
    points = joined.class_points()
    assert set(points[:, 0]) == set(range(240))
    with pytest.raises(IndexError, match="record 240 of 240"):
        joined[240]


def test_a_region_is_a_part_of_the_whole(scenes_dir, records):
    stored = open_records(config(scenes_dir), "val")
    for source in (records, stored):  # in memory, and from disk
        region = source.region(4, (10, 20, 50, 99))
        np.testing.assert_array_equal(region["image"], records[4]["image"][10:50, 20:99])
        np.testing.assert_array_equal(region["label"], records[4]["label"][10:50, 20:99])
        assert source.size(4) == (192, 256)


def test_a_batch_that_does_not_divide_shows_the_arithmetic(records):
    with pytest.raises(ValueError, match=r"7 is not divisible by 2 processes: 7 = 2 x 3 \+ 1"):
        iterator(records, batch=7, process_count=2)


def test_unprepared_data_name_the_folder_and_the_command(tmp_path):
    expected = r"'camvid' in .*camvid.2\.0\.0\. Prepare them: python -m duc_dlc_jax.data.prepare"
    with pytest.raises(FileNotFoundError, match=expected + r" --dataset=camvid --raw_dir=\w+"):
        open_records(config(tmp_path, name="camvid"), "train")


def test_unknown_and_unlabelled_splits_are_refused(scenes_dir, records):
    with pytest.raises(ValueError, match=r"no split 'test' in .*; it has: train, val"):
        open_records(config(scenes_dir), "test")
    bare = Records(records.folder, "val")
    bare.labelled = False
    with pytest.raises(ValueError, match="40 images without labels: it cannot train"):
        iterator(bare)
