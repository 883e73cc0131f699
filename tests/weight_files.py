"""Files of backbone weights for tests: small, in every format, sound or hostile."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from duc_dlc_jax import config as default_config
from duc_dlc_jax.models import pretrained, segmenter, tensor_files
from networks import NARROW


def model_config(**changes):
    c = default_config.default().model
    c.update(NARROW | changes)
    return c


def shapes(c):
    """(params, batch_stats) of the network as shapes, without running it."""
    model = segmenter.create(c, 3)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return variables["params"], variables["batch_stats"]


def file_tensors(width=4, deep=False, seed=0):
    """A depth-14 backbone under torchvision's or PyTorch-Encoding's names, with fc and counters."""
    random = np.random.default_rng(seed)
    tensors = {}

    def conv(name, outputs, inputs, kernel):
        shape = (outputs, inputs, kernel, kernel)
        tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)

    def bn(name, channels):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.{leaf}"] = random.random(channels).astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.asarray(7)

    inputs = 2 * width if deep else width
    if deep:
        conv("conv1.0", width, 3, 3)
        bn("conv1.1", width)
        conv("conv1.3", width, width, 3)
        bn("conv1.4", width)
        conv("conv1.6", inputs, width, 3)
    else:
        conv("conv1", width, 3, 7)
    bn("bn1", inputs)
    for stage in range(4):
        block, planes = f"layer{stage + 1}.0", width * 2**stage
        sizes = ((planes, inputs, 1), (planes, planes, 3), (4 * planes, planes, 1))
        for number, size in enumerate(sizes, 1):
            conv(f"{block}.conv{number}", *size)
            bn(f"{block}.bn{number}", size[0])
        conv(f"{block}.downsample.0", 4 * planes, inputs, 1)
        bn(f"{block}.downsample.1", 4 * planes)
        inputs = 4 * planes
    tensors["fc.weight"] = random.normal(size=(10, inputs)).astype(np.float32)
    tensors["fc.bias"] = random.normal(size=10).astype(np.float32)
    return tensors


def write(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        torch = pytest.importorskip("torch", reason="writing a .pth needs torch; reading does not")
        torch.save(
            {name: torch.from_numpy(value) for name, value in tensors.items()},
            path,
            _use_new_zipfile_serialization=path.name != "old.pth",
        )
    return path


def load(path, c, source="torchvision"):
    return pretrained.load_backbone(path, source, *shapes(c), c)


def check(params, batch_stats, tensors, deep=False):
    backbone = params["backbone"]
    first = tensors["conv1.6.weight" if deep else "conv1.weight"]
    np.testing.assert_array_equal(backbone["conv1"]["kernel"], first.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        backbone["layer3_0"]["conv2"]["kernel"],
        tensors["layer3.0.conv2.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        backbone["layer2_0"]["downsample_bn"]["scale"], tensors["layer2.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(
        batch_stats["backbone"]["layer4_0"]["bn3"]["var"], tensors["layer4.0.bn3.running_var"]
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(backbone))


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def stream(*, system=None, content=b"", keys=(), storages=b"", magic=tensor_files.MAGIC):
    """A file as torch.save wrote it before PyTorch 1.6."""
    system = {"little_endian": True} if system is None else system
    pickles = [pickle.dumps(part, 2) for part in (magic, 1001, system)]
    return b"".join([*pickles, content, pickle.dumps(list(keys), 2), storages])
