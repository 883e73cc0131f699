"""Padding that changes nothing, programs that are few, batches that do not enter the figures."""

from __future__ import annotations

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import evaluate, inference, labelling, padding, protocols, sharding
from duc_dlc_jax.data.labels import IGNORE, label_spec
from duc_dlc_jax.models import duc, resizing, segmenter, valid_cells
from networks import NARROW, images_of, jit, network, on_canvas, random_variables

GRIDS = pytest.mark.parametrize("grid", ["corners", "stride"])


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch):
    """The labeller's programs are compiled as the tests' own."""
    monkeypatch.setattr(jax, "jit", jit)


# Padding


@pytest.mark.parametrize(
    ("dtype", "grid", "bound"),
    [
        ("float64", "corners", 1e-10),
        ("float64", "stride", 1e-10),
        ("float64", "half_pixel", 1e-10),
        ("float32", "corners", 1e-5),
        ("bfloat16", "corners", 0.0),  # each sum is rounded once, after float32
        ("bfloat16", "stride", 0.0),
    ],
)
def test_padded_images_have_the_logits_of_the_unpadded(dtype, grid, bound, monkeypatch):
    """On the padded side g(I) runs in slabs, of 4 rows of 23; on the unpadded side it does not."""
    images = images_of((60, 93), (92, 70), (33, 50))
    canvas = on_canvas(images, (92, 96))
    valid = np.array([image.shape[:2] for image in images], np.int32)
    with jax.enable_x64(dtype == "float64"):
        model, variables, apply = network(grid, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(duc, "SLAB_BYTES", 2**12)
            in_slabs = jit(functools.partial(model.apply, coarse=True))
            padded = in_slabs(variables, canvas, valid=valid)
        for image, ours in zip(images, padded, strict=True):
            expected = apply(variables, image[None], coarse=True)[0]
            cells = np.s_[: expected.shape[0], : expected.shape[1]]
            assert expected.std() > 0.5
            assert np.abs(ours[cells] - expected).max() <= bound


def test_planted_fault_padding_without_masks():
    """Padded and not masked, the same network says something else."""
    (image,) = images_of((60, 93))
    with jax.enable_x64(True):
        _, variables, apply = network("corners")
        padded = apply(variables, on_canvas([image], (92, 96)), coarse=True)
        expected = apply(variables, image[None], coarse=True)
    assert np.abs(padded[:, :8, :12] - expected).max() > 0.1


@pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
def test_padded_images_are_resized_from_and_to_their_valid_sizes(grid):
    """Cells of 1/8 to pixels, to the 1/4 grid and back to 1/32."""
    valid, size = np.array([[60, 93], [92, 33], [1, 8]], np.int32), (96, 96)
    sizes = functools.partial(valid_cells.valid_sizes, jnp.asarray(valid), size)
    x = np.random.default_rng(0).normal(size=(3, 12, 12, 2))
    with jax.enable_x64(True):
        for stride in (1, 4, 32):
            cells, step = [n // stride for n in size], stride / 8
            ours = resizing.resize_bilinear(jnp.asarray(x), cells, grid, step, sizes)
            for image, result, pixels in zip(x, ours, valid, strict=True):
                source, target = (-(-pixels // s) for s in (8, stride))
                part = jnp.asarray(image[None, : source[0], : source[1]])
                expected = resizing.resize_bilinear(part, target.tolist(), grid, step)[0]
                ours_here = result[: target[0], : target[1]]
                np.testing.assert_allclose(ours_here, expected, rtol=0, atol=1e-12)


@GRIDS
def test_options_of_the_network_pad_exactly_too(grid):
    c = config_lib.default()
    c.model.update(NARROW | {"resize_grid": grid, "dtype": "float64"})
    c.model.update({"stem": "deep", "output_stride": 8, "commute_coefficients": False})
    c.model.update({"guidance_stride": 2, "guidance_kernel": 5})
    (image,) = images_of((75, 61))
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(duc, "SLAB_BYTES", 2**12)
        model = segmenter.create(c.model, 11)
        variables = random_variables(model)
        canvas, valid = on_canvas([image], (96, 96)), np.array([[75, 61]], np.int32)
        apply = jit(functools.partial(model.apply, coarse=True))
        padded, expected = apply(variables, canvas, valid=valid), apply(variables, image[None])
    np.testing.assert_allclose(padded[:, :10, :8], expected, rtol=0, atol=1e-10)


def test_exponents_beyond_float32_are_shifted_for_all_scores_alike():
    protocol = protocols.Protocol(average="exp_sum")
    logits = np.linspace(90, 100, 12, dtype=np.float32).reshape(1, 1, 1, 2, 2, 3)
    score = inference._score([(logits, None, None)], protocol)
    values = np.asarray(score([jnp.asarray(logits[:, 0, 0])]))
    assert np.isfinite(values).all()
    np.testing.assert_allclose(np.log(values), logits[:, 0, 0] - 20, rtol=1e-4)


@pytest.mark.parametrize("grid", ["corners", "stride", "half_pixel"])
def test_classes_one_by_one_give_the_largest_of_all(grid):
    """In the CPU's way and in the others', for images smaller than their canvas, ties included."""
    model = segmenter.create(config_lib.default().model, 7)
    protocol = protocols.Protocol(grid=grid, logit_stride=8, pad_sides=(96,))
    labeller = inference.Labeller(model, protocol, sharding.make_mesh(devices=jax.devices()[:1]))
    sizes, shape = [(60, 93), (92, 70), (7, 5)], (3, 92, 96)
    logits = np.random.default_rng(0).normal(size=(3, 12, 12, 7)).astype(np.float32)
    logits[:, :3, :3] = 1.0
    reads = labeller._reads(sizes, 1.0, shape[1:])
    rows, columns = map(inference._one_view, reads, shape[1:])
    ours = inference.class_by_class(jnp.asarray(logits), rows, columns)
    views = [(jnp.asarray(logits)[:, None, None], *reads)]
    expected = inference.over_tiles(views, shape, protocol, lambda x: x.argmax(-1))
    assert ours.dtype == jnp.uint8
    for ids, others, (height, width) in zip(ours, expected, sizes, strict=True):
        np.testing.assert_array_equal(ids[:height, :width], others[:height, :width])
    assert len(np.unique(ours)) == 7
    assert (ours[2, :7, :5] == 0).all()  # the first of equals


# Programs


def ade20k_like_sizes(count):
    """Short side 512 or, for small originals, less; long side up to 4 times as long."""
    rng = np.random.default_rng(0)
    short = np.where(rng.random(count) < 0.8, 512, rng.integers(96, 512, count))
    ratio = np.where(rng.random(count) < 0.9, rng.uniform(1, 1.8, count), rng.uniform(1, 4, count))
    sizes = np.stack([short, (short * ratio).astype(int)], 1)
    turned = rng.random(count) < 0.25
    sizes[turned] = sizes[turned, ::-1]
    return [(int(h), int(w)) for h, w in sizes]


@contextlib.contextmanager
def counted_compilations():
    """A list that grows by one with each program that XLA compiles or the disk cache answers."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_ade20k_compiles_at_most_12_programs():
    """Two hundred sizes, at an eighth of ADE20K's: a program for each pair of padded sides."""
    sides = protocols.Protocol.from_config(config_lib.load("configs/ade20k.py")).pad_sides
    protocol = protocols.Protocol(pad_sides=tuple(side // 8 for side in sides))
    sizes = [(h // 8, w // 8) for h, w in ade20k_like_sizes(200)]
    assert len(set(sizes)) > 100
    model, variables, _ = network("corners", "float32")
    evaluator = evaluate.Evaluator(model, label_spec("camvid"), 2, protocol)

    def examples():
        for image in images_of(*sizes):
            yield {"image": image, "label": np.zeros(image.shape[:2], np.uint8), "name": ""}

    variables = jax.device_put(variables, sharding.replicated(sharding.make_mesh()))
    with counted_compilations() as compiled:
        scores, _ = evaluator.run(variables, examples())
    assert scores["images"] == 200
    assert scores["matrix"].sum() == sum(h * w for h, w in sizes)
    programs = len({protocol.padded_size(size) for size in sizes})
    assert evaluator.programs() == {"network": programs, "other": 0}
    assert len(compiled) == programs <= 12


def test_padding_adds_little_work_on_ade20k():
    protocol = protocols.Protocol.from_config(config_lib.load("configs/ade20k.py"))
    sizes = ade20k_like_sizes(2000)
    padded = [protocol.padded_size(size) for size in sizes]
    assert len(set(padded)) <= 12
    assert sum(h * w for h, w in padded) / sum(h * w for h, w in sizes) < 1.3


@pytest.mark.parametrize("preset", protocols.PRESETS)
@pytest.mark.parametrize("configuration", ["ade20k", "camvid"])  # with pad_sides and without
def test_2000_sizes_are_planned_for_12_programs(configuration, preset):
    config = protocols.select(config_lib.load(f"configs/{configuration}.py"), preset, [])
    sizes = ade20k_like_sizes(2000)
    planned = protocols.Protocol.from_config(config).planned(sizes)
    inputs, pixels, needed = set(), 0, 0
    for size in sizes:
        padded = planned.padded_size(size)
        assert padded >= size
        assert padded[1] >= size[1]
        for scale in planned.scales:
            window, scaled = planned.window_size(padded, scale), planned.scaled_size(size, scale)
            if planned.mode == "whole":
                assert window >= scaled
                assert window[1] >= scaled[1]
            inputs.add(window)
            pixels, needed = pixels + math.prod(window), needed + math.prod(scaled)
    assert len(inputs) <= 12
    if planned.mode == "whole":
        assert pixels / needed < (1.3 if preset == "single" else 1.7)


def test_planned_inputs_compile_as_many_programs(monkeypatch):
    """Four sizes at two scales in two programs; `test_protocols` has what they must say."""
    monkeypatch.setattr(padding, "MOST_PROGRAMS", 2)
    model, variables, _ = network("corners", "float32")
    images = images_of((33, 29), (17, 38), (40, 33), (40, 51))
    planned = protocols.Protocol(scales=(0.5, 1.25)).planned([x.shape[:2] for x in images])
    assert len(planned.canvases) == len(planned.inputs) == 2
    predictor = labelling.Predictor(model, planned)
    batches = list(predictor.batches(variables, ({"image": image} for image in images)))
    assert [batch[0]["prediction"].shape for batch, _ in batches] == [x.shape[:2] for x in images]
    assert predictor.programs()["network"] == 2


def test_sliding_windows_compile_one_network():
    """Whatever the sizes and scales; the small programs follow the padded sizes."""
    model, variables, _ = network("corners", "float32")
    protocol = protocols.Protocol(
        "sliding", (0.5, 1.0), crop_size=32, stride=24, pad_sides=(40, 56)
    )
    labeller = inference.Labeller(model, protocol, sharding.make_mesh(devices=jax.devices()[:1]))
    for size in ((40, 40), (33, 29), (17, 38), (50, 33)):
        (image,), padded = images_of(size), protocol.padded_size(size)
        labels = np.zeros((1, *padded), np.uint8)
        _, ids = labeller(variables, on_canvas([image], padded), labels, [size])
        assert ids.shape == (1, *padded)
    assert labeller.programs()["network"] == 1


# Batches and hosts


@pytest.mark.parametrize("protocol", ["single", "sliding"])
def test_any_number_of_hosts_gives_the_same_figures_exactly(protocol):
    """Seven images of several sizes over 1, 2 and 3 hosts, in batches of 2 that are not full."""
    model, variables, _ = network("corners", "float32")
    chosen = {
        "single": protocols.Protocol(pad_sides=(32, 48)),
        "sliding": protocols.Protocol(
            "sliding", (1.0,), True, crop_size=32, stride=24, pad_sides=(48,)
        ),
    }[protocol]
    evaluator = evaluate.Evaluator(model, label_spec("camvid"), 2, chosen, boundary=True)
    variables = jax.device_put(variables, sharding.replicated(sharding.make_mesh()))
    rng = np.random.default_rng(0)
    examples = []
    for i, image in enumerate(images_of(*rng.integers(20, 49, (7, 2)).tolist())):
        label = rng.integers(0, 11, image.shape[:2]).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = IGNORE
        examples.append({"image": image, "label": label, "name": str(i)})
    matrices, edges = [], []
    for hosts in (1, 2, 3):
        shares = [evaluator.run(variables, examples[host::hosts])[0] for host in range(hosts)]
        assert sum(share["images"] for share in shares) == 7
        matrices.append(sum(share["matrix"] for share in shares))
        edges.append(sum(share["boundary"]["counts"] for share in shares))
    assert matrices[0].sum() == sum((e["label"] != IGNORE).sum() for e in examples)
    for matrix, counts in zip(matrices[1:], edges[1:], strict=True):
        np.testing.assert_array_equal(matrix, matrices[0])
        np.testing.assert_array_equal(counts, edges[0])
