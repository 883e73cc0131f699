"""The mesh: which sizes fit, which rows a process reads, and images split by rows."""

import json
import pathlib
import sys

import pytest

from duc_dlc_jax import sharding
from duc_dlc_jax.collectives import collectives, totals
from duc_dlc_jax.config import ConfigError
from networks import Device
from runs import TINY, run, tiny_config

PROGRAM = pathlib.Path(__file__).parent / "space.py"


def devices(count, per_process):
    """In another order than by process, as on some TPU slices."""
    return [Device(i, i % (count // per_process)) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "per_process", "data", "space", "message"),
    [
        (8, 8, -1, 3, r"mesh\.space=3 does not divide 8 devices \(8 = 2 x 3 \+ 2\); .* 1, 2, 4, 8"),
        (
            8,
            8,
            3,
            2,
            r"mesh\.data=3 x mesh\.space=2 = 6, and there are 8 devices; .* mesh\.data=-1",
        ),
        (8, 8, -1, 0, r"mesh\.data=-1, mesh\.space=0"),
        (12, 4, -1, 3, r"mesh\.space=3 does not fit processes of 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_shows_the_arithmetic(count, per_process, data, space, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(data, space, devices(count, per_process))


def test_rows_that_do_not_divide_show_the_arithmetic():
    with pytest.raises(ConfigError, match=r"\(72 = 2 x 32 \+ 8\); use data\.crop_size=64 or 96"):
        sharding.check_rows(72, 4)
    for height, space in ((72, 1), (480, 4), (1024, 16)):
        sharding.check_rows(height, space)


@pytest.mark.parametrize("space", [1, 2, 4, 8])
def test_every_row_of_a_batch_is_read_where_it_is_needed(space, monkeypatch):
    """Two processes of four devices; with space=8 both read every row."""
    mesh = sharding.make_mesh(-1, space, devices(8, 4))
    for process in (0, 1):
        monkeypatch.setattr(sharding.jax, "process_index", lambda p=process: p)
        index, count = sharding.share(mesh)
        rows = mesh.shape["data"] // count
        needed = [
            i for i, row in enumerate(mesh.devices) if process in {d.process_index for d in row}
        ]
        assert needed == list(range(index * rows, (index + 1) * rows))


@pytest.mark.parametrize(("space", "expected"), [(1, (1, 2, 8)), (4, (1, 2, 2)), (8, (1, 1, 1))])
def test_bn_groups_follow_hosts_and_devices(space, expected):
    mesh = sharding.make_mesh(-1, space, devices(8, 4))
    names = ("global", "host", "device")
    groups = [sharding.bn_groups(tiny_config("", model__bn_groups=name), mesh) for name in names]
    assert tuple(groups) == expected


COMPILED = """
  %a = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, metadata={op_name="first"}
  %b = (f32[8]{0}, bf16[2]{0}) all-reduce(%x, %y), replica_groups=[2,4]<=[8], to_apply=%s
  %c = s64[3]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}
  %c2 = pred[] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, to_apply=%s
  %d = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %e = f32[8,8]{1,0} all-gather-done(%d)
  %f = (bf16[5]{0}, bf16[5]{0}, u32[], u32[]) collective-permute-start(%x), pairs={{0,1}}
  %g = f32[9]{0} add(%all-reduce.1, %x)
"""


def test_collectives_are_read_in_every_form():
    found = [(c.kind, c.bytes, c.group) for c in collectives(COMPILED)]
    assert found == [
        ("all-reduce", 128, 2),
        ("all-reduce", 36, 4),
        ("all-reduce", 24, 4),
        ("all-reduce", 1, 2),
        ("all-gather", 256, 4),
        ("collective-permute", 10, 2),
    ]
    assert totals(collectives(COMPILED))["all-reduce"] == {"count": 4, "bytes": 189}
    with pytest.raises(ValueError, match="unknown form"):
        collectives("%a = f32[8] all-reduce(%x), replica_groups=something")


def split_against_whole(*fields):
    tiny = [f"--config.{name}={value}" for name, value in TINY.items()]
    tiny.append("--config.optimizer.learning_rate=1e-3")
    command = [sys.executable, str(PROGRAM), "--config=configs/demo.py", *tiny, *fields]
    return json.loads(run(command, devices=8).stdout)


# In float32 the rounding of another order of summation moves a ReLU's input across 0 now and then,
# and a gradient jumps by more than rounding (5e-3).
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("space", "crop", "groups"),
    [
        (4, 128, "global"),
        (2, 144, "device"),  # the 1/32 grid has 5 rows for 2 devices
    ],
)
def test_images_split_by_rows_train_as_whole_ones(space, crop, groups):
    """Convolutions, max-pool, resizes, BN, loss: the state after two steps on 8 devices or on 1."""
    result = split_against_whole(
        f"--config.mesh.space={space}",
        f"--config.data.crop_size={crop}",
        "--config.model.dtype=float64",
        f"--config.model.bn_groups={groups}",
    )
    print(f"largest relative difference {result['difference']:.2e} of {result['of']}")
    assert result["mesh"] == {"data": 8 // space, "space": space}
    assert result["difference"] <= 1e-10
    # Rows cross the border of two devices; nothing of the image's size is ever gathered.
    assert result["collectives"]["collective-permute"]["count"] > 20
    images = 4 // result["mesh"]["data"]
    assert result["largest"]["all-gather"][0] < images * crop * crop * 3


@pytest.mark.multiprocess
def test_bn_per_host_keeps_its_sums_in_the_host():
    """8 devices, 4 x 2, as two hosts of 4: sums go over `space`, then over a part of `data`."""
    groups = {}
    for name, parts in {"global": 1, "host": 2}.items():
        result = split_against_whole(
            "--config.mesh.space=2", f"--bn_parts={parts}", "--config.model.dtype=float64"
        )
        groups[name] = max(size for source, size in result["groups"] if "scale_and_shift" in source)
        assert result["difference"] <= 1e-10
    assert groups == {"global": 4, "host": 2}
