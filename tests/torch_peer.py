"""PyTorch's side of `duc_dlc_jax.benchmark --peer=torch`: a process that times the same network.

    python tests/torch_peer.py FOLDER        (started by the benchmark)

FOLDER holds config.json, variables.npz, batch.npz (image, label, infer) and settings.json. The
process builds the network of `torch_twin` with the package's algebraic shortcuts, in channels_last,
under bfloat16 autocast where the configuration says bfloat16, writes the logits of the first image,
and then answers lines of JSON on stdin: {"what": "train" or "infer", "steps": N, "way": "eager" or
"compile"} -> {"seconds": per call, "peak_bytes": ...}; {"what": "groups", "steps": N} -> {"groups":
{layer group: seconds}} of one image labelled in eager mode. Where settings.json has shapes, it
times single convolutions instead and prints their seconds.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import torch_twin
from duc_dlc_jax import config as config_lib

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FastDUC(torch_twin.DUC):
    """DUC with both shortcuts of `duc_dlc_jax.models.duc`; the twin does the plain thing."""

    def forward(self, image, middle, low):
        size, grid = middle.shape[2:], self.m.resize_grid
        if self.m.guidance_stride == 2:
            half = tuple(-(-n // 2) for n in image.shape[2:])
            image = torch_twin.resize(image, half, grid, 2)
        guidance = self.stride4[1](self.strided(image))
        guidance = torch_twin.resize(guidance, size, grid, 2 / self.m.guidance_stride)
        return torch.cat([self.output(guidance, self.low(low), size), middle], 1)

    def output(self, guidance, low, size):
        if self.m.duc_upsampled != "features":  # whose coefficients are made on I_l's grid already
            return super().output(guidance, low, size)
        grid, width = self.m.resize_grid, self.m.duc_width
        weight, bias = self.coefficients.weight, self.coefficients.bias
        from_low = F.conv2d(low, weight[:, width:])
        from_low = torch_twin.resize(from_low, size, grid, 8 / self.m.output_stride)
        a, b = (F.conv2d(guidance, weight[:, :width], bias) + from_low).chunk(2, 1)
        return a * guidance + b

    def strided(self, image):
        """The stride-4 convolution of g(I), with g at the pixels that it reads alone."""
        first, norm, second, last = self.g[0].weight, self.g[1], self.g[3], self.stride4[0]
        k, pad = self.m.guidance_kernel, (self.m.guidance_kernel - 1) // 2
        with torch.autocast(DEVICE.type, enabled=False):
            factor, shift = self.statistics(image.float(), first[:, :, 0, 0], norm)
            composed = torch.einsum("ocij,cd->odij", last.weight, second.weight[:, :, 0, 0])
            border = torch.einsum("ocij,c->oij", last.weight, second.bias)
        height, width = image.shape[2:]
        rows, columns = -(-height // 4), -(-width // 4)
        ends = [4 * n - 4 + k for n in (rows, columns)]
        edges = (pad, ends[1] - pad - width, pad, ends[0] - pad - height)
        padded = F.pad(image.float(), edges)
        inside = F.pad(torch.ones_like(image[:1, :1], dtype=torch.float32), edges)
        weights, taps, borders = first[:, :, 0, 0] * factor[:, None], [], 0
        for i in range(k):
            for j in range(k):
                part = np.s_[:, :, i : i + 4 * rows - 3 : 4, j : j + 4 * columns - 3 : 4]
                x, here = padded[part], inside[part]
                y = sum(x[:, c, None] * weights[:, c].view(1, -1, 1, 1) for c in range(3))
                y = F.relu(y + shift.view(1, -1, 1, 1)) * here
                taps.append(y.to(image.dtype))
                borders = borders + here * border[:, i, j].view(1, -1, 1, 1)
        flat = composed.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
        stacked = torch.cat(taps, 1).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(stacked, flat.to(image.dtype))
        return y + borders.to(y.dtype)

    def statistics(self, image, weight, norm):
        """Scale and shift of the BN of a 1x1 of the image, from the image's moments."""
        if norm.training:
            count = image.numel() // 3
            mean = image.mean((0, 2, 3))
            flat = image.permute(1, 0, 2, 3)
            second = torch.stack([(flat[i] * flat[j]).mean() for i in range(3) for j in range(3)])
            covariance = second.view(3, 3) - mean[:, None] * mean[None]
            mean, var = weight @ mean, torch.einsum("ci,ij,cj->c", weight, covariance, weight)
            with torch.no_grad():
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        else:
            mean, var = norm.running_mean, norm.running_var
        factor = norm.weight * torch.rsqrt(var.clamp(min=0) + norm.eps)
        return factor, norm.bias - factor * mean


class Peer:
    def __init__(self, folder: pathlib.Path):
        config = config_lib.from_json((folder / "config.json").read_text())
        batch = np.load(folder / "batch.npz")
        flat = dict(np.load(folder / "variables.npz"))
        variables: dict = {}
        for name, value in flat.items():
            node = variables
            *parents, leaf = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        torch_twin.DUC = FastDUC
        self.net = torch_twin.Twin(config.model, classes(variables)).float()
        state = torch_twin.to_torch(variables, config.model.dlc_rates)
        missing, unexpected = self.net.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
        self.net = self.net.to(DEVICE, memory_format=torch.channels_last)
        self.half = config.model.dtype == "bfloat16"
        self.images = torch.from_numpy(batch["image"]).to(DEVICE).permute(0, 3, 1, 2)
        self.image = torch.from_numpy(batch["infer"]).to(DEVICE).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(batch["label"]).long().to(DEVICE)
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.mean = torch.tensor(mean, device=DEVICE).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=DEVICE).view(1, 3, 1, 1)
        o = config.optimizer
        new = [p for n, p in self.net.named_parameters() if not n.startswith("backbone")]
        old = [p for n, p in self.net.named_parameters() if n.startswith("backbone")]
        groups = [{"params": old}, {"params": new, "lr": o.learning_rate * o.new_layer_multiplier}]
        self.optimizer = torch.optim.SGD(
            groups, o.learning_rate, o.momentum, weight_decay=o.weight_decay, foreach=True
        )
        self.compiled: dict = {}

    def normalised(self, images):
        x = (images.float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        return x.bfloat16() if self.half else x

    def loss(self, images, labels):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.half):
            logits = self.logits(self.normalised(images), labels.shape[1:])
        return F.cross_entropy(logits, labels, ignore_index=255)

    def logits(self, x, size):
        """The twin's forward, its logits in float32 before they are resized, as ours are."""
        net = self.net
        _, middle, _, low = net.backbone(x)
        x = net.dlc(net.duc(x, middle, low))
        x = F.dropout2d(x, net.m.dropout, net.training)
        return torch_twin.resize(net.classifier(x).float(), size, net.m.resize_grid, 1 / 8)

    def label(self, images):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.half):
            return self.logits(self.normalised(images), images.shape[2:]).argmax(1)

    def way(self, name: str, function):
        key = (name, function.__name__)
        if key not in self.compiled:
            self.compiled[key] = torch.compile(function) if name == "compile" else function
        return self.compiled[key]

    def train(self, way: str) -> torch.Tensor:
        self.net.train()
        loss = self.way(way, self.loss)(self.images, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def infer(self, way: str) -> torch.Tensor:
        self.net.eval()
        with torch.inference_mode():
            return self.way(way, self.label)(self.image)

    def groups(self, steps: int) -> dict[str, float]:
        """Median seconds of the network's parts in labelling, each waited for."""
        parts = {"backbone": self.net.backbone, "guidance": self.net.duc, "duc": self.net.duc}
        parts |= {f"layer{i}": getattr(self.net.backbone, f"layer{i}") for i in range(1, 5)}
        parts |= {"dlc": self.net.dlc, "classifier": self.net.classifier}
        methods = {name: "strided" if name == "guidance" else "forward" for name in parts}
        taken: dict[str, list[float]] = {name: [] for name in (*parts, "other")}
        for name, module in parts.items():
            setattr(module, methods[name], timed(getattr(module, methods[name]), taken[name]))
        whole = timed(self.infer, taken["other"])
        for _ in range(steps + 2):
            whole("eager")
        for name, module in parts.items():
            delattr(module, methods[name])  # of the instance: the class's own is left
        found = {name: float(np.median(seconds[2:])) for name, seconds in taken.items()}
        found["other"] -= sum(found[name] for name in ("backbone", "duc", "dlc", "classifier"))
        found["duc"] -= found["guidance"]
        found["stem"] = found.pop("backbone") - sum(found[f"layer{i}"] for i in range(1, 5))
        return found

    def first_logits(self) -> np.ndarray:
        self.net.eval()
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.half):
            x = self.normalised(self.images[:1])
            logits = self.logits(x, self.images.shape[2:])
        return logits.permute(0, 2, 3, 1).cpu().numpy()


def timed(function, taken: list[float]):
    """The function, which notes the seconds of each call."""

    def call(*args):
        wait()
        start = time.perf_counter()
        result = function(*args)
        wait()
        taken.append(time.perf_counter() - start)
        return result

    return call


def layer_seconds(shapes, batch: int, half: bool, steps: int) -> list[dict[str, float]]:
    """Seconds of a dilated 3x3 convolution and of both its gradients, per shape, channels_last."""
    rows, dtype = [], torch.bfloat16 if half else torch.float32
    for channels, features, side, dilation in shapes:
        x = torch.randn(batch, channels, side, side, device=DEVICE, dtype=dtype)
        kernel = torch.randn(features, channels, 3, 3, device=DEVICE, dtype=dtype)
        dy = torch.randn(batch, features, side, side, device=DEVICE, dtype=dtype)
        x, kernel, dy = (a.contiguous(memory_format=torch.channels_last) for a in (x, kernel, dy))
        pad = [dilation] * 2

        def gradient(mask, x=x, kernel=kernel, dy=dy, pad=pad):
            return torch.ops.aten.convolution_backward(
                dy, x, kernel, None, [1, 1], pad, pad, False, [0, 0], 1, mask
            )

        calls = {
            "forward": lambda x=x, kernel=kernel, pad=pad: F.conv2d(x, kernel, None, 1, pad, pad),
            "input gradient": lambda f=gradient: f([True, False, False]),
            "weight gradient": lambda f=gradient: f([False, True, False]),
        }
        rows.append({name: median_seconds(call, steps) for name, call in calls.items()})
    return rows


def median_seconds(call, rounds: int, calls: int = 5) -> float:
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times[2:]))


def classes(variables) -> int:
    return variables["params"]["classifier"]["kernel"].shape[-1]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main(folder: str) -> None:
    torch.backends.cudnn.benchmark = True
    root = pathlib.Path(folder)
    settings = json.loads((root / "settings.json").read_text())
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    if "shapes" in settings:
        asked = (settings[name] for name in ("shapes", "batch", "half", "steps"))
        print(json.dumps(layer_seconds(*asked)))
        return
    torch.manual_seed(0)
    peer = Peer(root)
    np.save(root / "torch_logits.npy", peer.first_logits())
    print(json.dumps({"ready": torch.__version__, "device": DEVICE.type}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "groups":
            print(json.dumps({"groups": peer.groups(asked["steps"])}), flush=True)
            continue
        call, way = getattr(peer, asked["what"]), asked["way"]
        try:
            wait()
            start = time.perf_counter()
            for _ in range(asked["steps"]):
                call(way)
            wait()
            seconds = (time.perf_counter() - start) / asked["steps"]
            peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
            answer = {"seconds": seconds, "peak_bytes": peak}
        except Exception as error:  # a way that fails here is left out, with its reason
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
