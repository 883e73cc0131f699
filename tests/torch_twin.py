"""The network once more, in PyTorch, written from docs/network.md: what the parity tests refer to.

It shares no code with the package. Where the package takes a shortcut with equal numbers (the
coefficients' 1x1 in two halves, resizes as matrix products) the twin does the plain thing. Images
are normalised [B, 3, H, W]; backbone names are torchvision's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util
from torch import nn

BLOCKS = {14: [1, 1, 1, 1], 26: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
BLOCKS |= {152: [3, 8, 36, 3], 269: [3, 30, 48, 8]}
DILATIONS = {  # per output stride: stride, dilation of the first block and of the rest, per stage
    32: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)],
    16: [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)],
    8: [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)],
}


def conv(inputs, outputs, kernel=1, stride=1, dilation=1, bias=False):
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=bias)


def conv_bn_relu(inputs, outputs, kernel=1, dilation=1):
    layers = conv(inputs, outputs, kernel, 1, dilation), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


def resize(x, size, grid, ratio):
    """Bilinear to `size`; ratio: source cells per destination cell, used by grid="stride"."""
    if grid == "corners":
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)
    if grid == "half_pixel":
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    for axis, length in zip((2, 3), size, strict=True):
        last = x.shape[axis] - 1
        wide = torch.promote_types(x.dtype, torch.float32)
        position = (torch.arange(length, dtype=wide, device=x.device) * ratio).clamp(max=last)
        before = position.floor().long()
        after = (before + 1).clamp(max=last)
        weight = (position - before).to(x.dtype)
        weight = weight.view(-1, 1) if axis == 2 else weight
        x = x.index_select(axis, before) * (1 - weight) + x.index_select(axis, after) * weight
    return x


class Block(nn.Module):
    def __init__(self, inputs, width, stride, dilation, stride_on):
        super().__init__()
        on_first = stride_on == "1x1"
        self.conv1 = conv(inputs, width, 1, stride if on_first else 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1 if on_first else stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if inputs != 4 * width:
            project = conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(*project)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    def __init__(self, m):
        super().__init__()
        width = m.width
        if m.stem == "plain":
            inputs = width
            self.conv1 = conv(3, width, 7, 2)
        else:
            first = {"deep": width, "narrow": width // 2}[m.stem]
            inputs = 2 * first
            self.conv1 = nn.Sequential(
                conv(3, first, 3, 2), nn.BatchNorm2d(first), nn.ReLU(),
                conv(first, first, 3), nn.BatchNorm2d(first), nn.ReLU(),
                conv(first, inputs, 3),
            )  # fmt: skip
        self.bn1 = nn.BatchNorm2d(inputs)
        stages = zip(BLOCKS[m.depth], DILATIONS[m.output_stride], strict=True)
        for i, (count, (stride, first, rest)) in enumerate(stages):
            planes = width * 2**i
            blocks = [Block(inputs, planes, stride, first, m.stride_on)]
            blocks += [Block(4 * planes, planes, 1, rest, m.stride_on) for _ in range(count - 1)]
            inputs = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            outputs.append(x)
        return outputs


class DUC(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m, width, g = m, m.duc_width, m.guidance_width
        self.g = nn.Sequential(conv(3, g), nn.BatchNorm2d(g), nn.ReLU(), conv(g, g, bias=True))
        stride4 = conv(g, width, m.guidance_kernel, 4), nn.BatchNorm2d(width)
        self.stride4 = nn.Sequential(*stride4)
        self.low = conv_bn_relu(32 * m.width, width, 3, m.duc_dilation)
        self.coefficients = conv(2 * width, 2 * width, bias=True)

    def forward(self, image, middle, low):
        m, size = self.m, middle.shape[2:]
        if m.guidance_stride == 2:
            half = [(n + 1) // 2 for n in image.shape[2:]]
            image = resize(image, half, m.resize_grid, 2)
        guidance = self.stride4(self.g(image))
        guidance = resize(guidance, size, m.resize_grid, 2 / m.guidance_stride)
        return torch.cat([self.output(guidance, self.low(low), size), middle], 1)

    def output(self, guidance, low, size):
        """G~ on I_m's grid, of `size`, and I~ on I_l's -> O on I_m's."""
        grid, step, here = self.m.resize_grid, 8 / self.m.output_stride, guidance
        if self.m.duc_upsampled == "features":
            low = resize(low, size, grid, step)
        else:
            here = resize(guidance, low.shape[2:], grid, 1 / step)
        coefficients = self.coefficients(torch.cat([here, low], 1))
        if self.m.duc_upsampled == "coefficients":
            coefficients, here = resize(coefficients, size, grid, step), guidance
        a, b = coefficients.chunk(2, 1)
        output = a * here + b
        return resize(output, size, grid, step) if self.m.duc_upsampled == "output" else output


class DLC(nn.Module):
    def __init__(self, m, inputs):
        super().__init__()
        self.reduce = conv_bn_relu(inputs, m.dlc_width)
        widths = [m.dlc_width + i * m.dlc_growth for i in range(len(m.dlc_rates))]
        self.branches = nn.ModuleList(
            nn.Sequential(
                *conv_bn_relu(width, m.dlc_growth), *conv_bn_relu(m.dlc_growth, m.dlc_growth, 3, d)
            )
            for width, d in zip(widths, m.dlc_rates, strict=True)
        )

    def forward(self, x):
        x = self.reduce(x)
        for branch in self.branches:
            x = torch.cat([x, branch(x)], 1)
        return x


class Twin(nn.Module):
    """`m`: config.model. In float64, with PyTorch's BatchNorm (momentum 0.1 is Flax's 0.9)."""

    def __init__(self, m, classes):
        super().__init__()
        self.m = m
        self.backbone = ResNet(m)
        self.duc = DUC(m)
        self.dlc = DLC(m, m.duc_width + 8 * m.width)
        width = m.dlc_width + len(m.dlc_rates) * m.dlc_growth
        self.classifier = conv(width, classes, bias=True)
        if m.aux_head:
            w = 16 * m.width
            last = nn.Dropout2d(m.dropout), conv(w // 4, classes, bias=True)
            self.aux = nn.Sequential(*conv_bn_relu(w, w // 4, 3), *last)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = 1 - m.bn_momentum, m.bn_epsilon
        self.double()

    def forward(self, image):
        """Normalised [B, 3, H, W] -> logits [B, classes, H, W], and the auxiliary ones or None."""
        size, grid = image.shape[2:], self.m.resize_grid
        _, middle, layer3, low = self.backbone(image)
        x = self.dlc(self.duc(image, middle, low))
        x = F.dropout2d(x, self.m.dropout, self.training)
        logits = resize(self.classifier(x), size, grid, 1 / 8)
        if not self.m.aux_head:
            return logits, None
        stride = {32: 16, 16: 16, 8: 8}[self.m.output_stride]
        return logits, resize(self.aux(layer3), size, grid, 1 / stride)


def normalized(images: np.ndarray) -> torch.Tensor:
    """uint8 RGB [B, H, W, 3] -> float64 [B, 3, H, W]."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((images / 255.0 - mean) / std).permute(0, 3, 1, 2).contiguous()


def randomize(module: nn.Module, seed: int) -> None:
    """Random weights, BN scales, shifts and running statistics that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale=1.0, shift=0.0):
        tensor.normal_(shift, scale, generator=generator)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                normal(layer.weight, (2 / layer.weight[0].numel()) ** 0.5)
                if layer.bias is not None:
                    normal(layer.bias, 0.1)
            elif isinstance(layer, nn.BatchNorm2d):
                normal(layer.weight, 0.1, 0.7)
                normal(layer.bias, 0.1)
                normal(layer.running_mean, 0.1)
                layer.running_var.uniform_(0.5, 1.5, generator=generator)


NAMES = {
    "stem_conv1": "conv1.0", "stem_bn1": "conv1.1", "stem_conv2": "conv1.3", "stem_bn2": "conv1.4",
    "g_conv1": "g.0", "g_bn": "g.1", "g_conv2": "g.3", "guidance_conv": "stride4.0",
    "guidance_bn": "stride4.1", "low_conv": "low.0", "low_bn": "low.1", "reduce_conv": "reduce.0",
    "reduce_bn": "reduce.1", "aux_conv": "aux.0", "aux_bn": "aux.1", "aux_classifier": "aux.4",
    "downsample_conv": "downsample.0", "downsample_bn": "downsample.1",
}  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var"}
DLC_PARTS = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4"}


def _torch_name(path: tuple[str, ...], rates, deep: bool) -> str:
    parts = []
    for i, part in enumerate(path[:-1]):
        if path[i - 1] == "dlc" and part not in NAMES:  # d12_conv2
            rate, layer = part[1:].split("_")
            parts.append(f"branches.{rates.index(int(rate))}.{DLC_PARTS[layer]}")
        elif deep and path[i - 1] == "backbone" and part == "conv1":
            parts.append("conv1.6")
        else:
            parts.append(NAMES.get(part, part.replace("_", ".")))
    return ".".join([*parts, LEAVES[path[-1]]])


def _names(paths, rates) -> dict[tuple[str, ...], str]:
    deep = any(path[:2] == ("backbone", "stem_conv1") for path in paths)
    return {path: _torch_name(path, tuple(rates), deep) for path in paths}


def to_torch(variables, rates=(3, 6, 12, 18)) -> dict[str, torch.Tensor]:
    """Flax {params, batch_stats} -> state dict (without num_batches_tracked)."""
    state = {}
    for tree in (variables["params"], variables["batch_stats"]):
        flat = traverse_util.flatten_dict(tree)
        for path, name in _names(list(flat), rates).items():
            value = np.asarray(flat[path])
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
            state[name] = torch.from_numpy(np.array(value, order="C"))
    guidance = state.pop("duc.coefficients.guidance.weight")
    low = state.pop("duc.coefficients.low.weight")
    state["duc.coefficients.weight"] = torch.cat([guidance, low], 1)
    state["duc.coefficients.bias"] = state.pop("duc.coefficients.guidance.bias")
    return state


def from_torch(state, like, rates=(3, 6, 12, 18)):
    """State dict -> float64 NumPy {params, batch_stats} with the structure and shapes of `like`."""
    state = {name: value.detach().double().numpy() for name, value in state.items()}
    if "duc.coefficients.weight" in state:
        weight = state["duc.coefficients.weight"]
        half = weight.shape[1] // 2
        state["duc.coefficients.guidance.weight"] = weight[:, :half]
        state["duc.coefficients.low.weight"] = weight[:, half:]
        state["duc.coefficients.guidance.bias"] = state["duc.coefficients.bias"]
    variables = {}
    for kind in ("params", "batch_stats"):
        flat = traverse_util.flatten_dict(like[kind])
        new = {}
        for path, name in _names(list(flat), rates).items():
            value = state[name]
            new[path] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            assert new[path].shape == flat[path].shape, (name, new[path].shape, flat[path].shape)
        variables[kind] = traverse_util.unflatten_dict(new)
    return variables
