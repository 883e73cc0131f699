"""PyTorch's side of `duc_dlc_jax.benchmark --peer=torch`: a process that times the same network.

    python tests/torch_peer.py FOLDER        (started by the benchmark)

FOLDER holds config.json, variables.npz, batch.npz (image, label, infer), settings.json, and in
expected.npz what the package computes (`Peer.differences`). The process builds the network of
`torch_twin` with the package's algebraic shortcuts, under bfloat16 autocast where the configuration
says bfloat16, says how far it is from the package, and then answers lines of JSON on stdin:

    {"prepare": "train" or "infer", "way": one of WAYS} -> {"guidance": one of FORMS}
    {"steps": N} -> {"seconds": of a call of what was prepared, "peak_bytes": on a GPU}
    {"groups": N} -> {"groups": {layer group: seconds}} of one image labelled in eager mode

or {"error": what was raised}.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util

import torch_twin
from duc_dlc_jax import config as config_lib

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("eager", "compile", "eager-nchw", "compile-nchw")  # channels_last where not said
FORMS = ("convolution", "taps", "plain")


class FastDUC(torch_twin.DUC):
    """DUC with both shortcuts of `duc_dlc_jax.models.duc`; the twin does the plain thing.

    form: of the stride-4 convolution of g(I). "plain": g on the whole image. Else g at the pixels
    that are read alone, as one convolution of the image, or from a slice of it for each of the
    kernel's taps.
    """

    form = "convolution"

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
        """The stride-4 convolution of g(I): [B, width, ceil(H / 4), ceil(W / 4)].

        The image gets a fourth channel of ones: it carries BN's shift, and beyond the border, where
        it is 0, g is 0. g gets one more output, which is that channel: it carries the bias of g's
        second 1x1, which is multiplied into the kernel.
        """
        if self.form == "plain":
            return self.stride4[0](self.g(image))
        first, norm, second, last = self.g[0].weight, self.g[1], self.g[3], self.stride4[0]
        with torch.autocast(DEVICE.type, enabled=False):
            factor, shift = self.statistics(image.float(), first[:, :, 0, 0], norm)
            weights = torch.cat([first[:, :, 0, 0] * factor[:, None], shift[:, None]], 1)
            weights = torch.cat([weights, weights.new_tensor([[0, 0, 0, 1]])])
            after = torch.cat([second.weight[:, :, 0, 0], second.bias[:, None]], 1)
            composed = torch.einsum("ocij,cd->oijd", last.weight, after).flatten(1)
        fill = -composed.shape[1] % 16  # whole vectors and tensor cores
        composed = F.pad(composed, (0, fill))[:, :, None, None].to(image.dtype)
        image = torch.cat([image, torch.ones_like(image[:, :1])], 1)
        read = self.convolved if self.form == "convolution" else self.sliced
        return F.conv2d(read(image, weights, fill), composed)

    def convolved(self, image, weights, fill):
        """g where the kernel reads it: [B, k * k * (channels + 1) + fill, h, w]; weights [., 4]."""
        k = self.m.guidance_kernel
        at = torch.eye(k * k, device=image.device).view(k * k, 1, 1, k, k)
        kernel = (at * weights[None, :, :, None, None]).flatten(0, 1)
        kernel = F.pad(kernel, (0, 0, 0, 0, 0, 0, 0, fill)).to(image.dtype)
        return F.relu(F.conv2d(image, kernel, stride=4, padding=(k - 1) // 2))

    def sliced(self, image, weights, fill):
        """The same as `convolved`."""
        k, pad = self.m.guidance_kernel, (self.m.guidance_kernel - 1) // 2
        rows, columns = (-(-n // 4) for n in image.shape[2:])
        ends = [4 * n - 4 + k - pad for n in (rows, columns)]
        x = F.pad(image.float(), (pad, ends[1] - image.shape[3], pad, ends[0] - image.shape[2]))
        taps = []
        for i in range(k):
            for j in range(k):
                part = x[:, :, i : i + 4 * rows - 3 : 4, j : j + 4 * columns - 3 : 4]
                y = sum(part[:, c, None] * weights[:, c].view(1, -1, 1, 1) for c in range(4))
                taps.append(F.relu(y).to(image.dtype))
        taps.append(torch.zeros_like(taps[0][:, :1]).expand(-1, fill, -1, -1))
        last = image.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.cat(taps, 1).contiguous(memory_format=layout)

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
        variables = tree(np.load(folder / "variables.npz"))
        torch_twin.DUC = FastDUC
        self.net = torch_twin.Twin(config.model, classes(variables)).float()
        state = torch_twin.to_torch(variables, config.model.dlc_rates)
        missing, unexpected = self.net.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
        self.net = self.net.to(DEVICE)
        self.half, self.dropout = config.model.dtype == "bfloat16", config.model.dropout
        self.layout = torch.channels_last
        self.images, self.labels = on_device(batch["image"]), on_device(batch["label"]).long()
        self.image = batch["infer"]
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.mean = torch.tensor(mean, device=DEVICE).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=DEVICE).view(1, 3, 1, 1)
        o = config.optimizer
        new = [p for n, p in self.net.named_parameters() if not n.startswith("backbone")]
        old = [p for n, p in self.net.named_parameters() if n.startswith("backbone")]
        groups = [{"params": old}, {"params": new, "lr": o.learning_rate * o.new_layer_multiplier}]
        self.optimizer = torch.optim.SGD(
            groups, o.learning_rate, o.momentum, weight_decay=o.weight_decay, fused=True
        )

    def normalised(self, images):
        """uint8 [B, H, W, 3] -> [B, 3, H, W] in the layout and the type of the network."""
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=self.layout)
        return x.bfloat16() if self.half else x

    def autocast(self):
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.half)

    def logits(self, images):
        """The twin's forward, its logits in float32 before they are resized, as ours are."""
        net = self.net
        with self.autocast():
            image = self.normalised(images)
            _, middle, _, low = net.backbone(image)
            x = net.dlc(net.duc(image, middle, low))
            x = F.dropout2d(x, self.dropout, net.training)
            x = net.classifier(x).float()
            return torch_twin.resize(x, image.shape[2:], net.m.resize_grid, 1 / 8)

    def loss(self, images, labels):
        return F.cross_entropy(self.logits(images), labels, ignore_index=255)

    def label(self, images):
        return self.logits(images).argmax(1).to(torch.uint8)

    def train(self, loss) -> None:
        """A step; loss: the method of this name, compiled or not."""
        loss = loss(self.images, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def infer(self, label) -> np.ndarray:
        """An image to ids, both on the host; label: the method of this name, compiled or not."""
        with torch.inference_mode():
            return label(on_device(self.image)).cpu().numpy()

    def prepare(self, what: str, way: str) -> str:
        """Gets `call` ready to train or infer in one of WAYS; returns the form of g(I)."""
        torch.compiler.reset()
        self.layout = torch.contiguous_format if way.endswith("nchw") else torch.channels_last
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()  # the other layout's, and memory that inference does without
        self.net.to(memory_format=self.layout).train(what == "train")
        compiled = lambda function: function  # noqa: E731
        if way.startswith("compile"):
            compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self.net.duc.form = self.fastest_form(what, compiled)
        parts = {"train": (self.train, self.loss), "infer": (self.infer, self.label)}
        run, function = parts[what]
        self.call = functools.partial(run, compiled(function))
        for _ in range(2):
            self.call()
        return self.net.duc.form

    def fastest_form(self, what: str, compiled) -> str:
        """The form of g(I) that takes least, alone, with its gradients in training."""
        duc, taken = self.net.duc, {}
        with torch.no_grad():
            image = self.normalised(self.images if what == "train" else on_device(self.image))
        strided, weights = compiled(duc.strided), [*duc.g.parameters(), duc.stride4[0].weight]
        for duc.form in FORMS:
            with torch.set_grad_enabled(what == "train"), self.autocast():

                def call():
                    y = strided(image)
                    return torch.autograd.grad(y, weights, y) if y.requires_grad else y

                taken[duc.form] = median_seconds(call, 3, 1)
        return min(taken, key=taken.get)

    def seconds(self, steps: int) -> dict:
        """Of one call of `steps`, and the most memory that was allocated meanwhile."""
        cuda = DEVICE.type == "cuda"
        wait()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            self.call()
        wait()
        seconds = (time.perf_counter() - start) / steps
        return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0}

    def groups(self, steps: int) -> dict[str, float]:
        """Median seconds of the network's parts in labelling, each waited for."""
        self.prepare("infer", "eager")
        parts = {"backbone": self.net.backbone, "guidance": self.net.duc, "duc": self.net.duc}
        parts |= {f"layer{i}": getattr(self.net.backbone, f"layer{i}") for i in range(1, 5)}
        parts |= {"dlc": self.net.dlc, "classifier": self.net.classifier}
        methods = {name: "strided" if name == "guidance" else "forward" for name in parts}
        taken: dict[str, list[float]] = {name: [] for name in (*parts, "other")}
        for name, module in parts.items():
            setattr(module, methods[name], timed(getattr(module, methods[name]), taken[name]))
        whole = timed(self.call, taken["other"])
        for _ in range(steps + 2):
            whole()
        for name, module in parts.items():
            delattr(module, methods[name])  # of the instance: the class's own is left
        found = {name: float(np.median(seconds[2:])) for name, seconds in taken.items()}
        found["other"] -= sum(found[name] for name in ("backbone", "duc", "dlc", "classifier"))
        found["duc"] -= found["guidance"]
        found["stem"] = found.pop("backbone") - sum(found[f"layer{i}"] for i in range(1, 5))
        return found

    def differences(self, expected) -> dict[str, float]:
        """Relative ones to what the package computes without dropout, of g(I)'s worst form.

        expected: image uint8 [B, H, W, 3], label uint8 [B, H, W]; logits [1, H, W, K] of the first
        image in evaluation; and of the batch in training, if there, loss and gradient/NAME in
        float32. Gradients are compared behind the backbone, and their norm over everything: through
        the BN of a deep backbone float32's own rounding becomes a hundredth of the gradient.
        """
        found: dict[str, list[float]] = {}

        def note(name, theirs, ours):
            ours = np.concatenate([np.ravel(x) for x in ours]).astype(np.float64)
            theirs = np.concatenate([x.detach().float().cpu().numpy().ravel() for x in theirs])
            difference = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
            found.setdefault(name, []).append(float(difference))

        images, labels = on_device(expected["image"]), on_device(expected["label"]).long()
        kept = self.half, self.dropout, torch.backends.cudnn.allow_tf32
        self.dropout, torch.backends.cudnn.allow_tf32 = 0.0, False
        for self.net.duc.form in FORMS:
            self.net.eval()
            with torch.no_grad():
                logits = self.logits(images[:1]).permute(0, 2, 3, 1)
            note("logits", [logits], [expected["logits"]])
        self.half = False
        for self.net.duc.form in FORMS if "loss" in expected else ():
            self.net.train()
            loss = self.loss(images, labels)
            names, parameters = zip(*self.net.named_parameters(), strict=True)
            ours = {"params": tree(expected)["gradient"], "batch_stats": {}}
            ours = torch_twin.to_torch(ours, self.net.m.dlc_rates)
            note("loss", [loss], [expected["loss"]])
            theirs = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
            heads = [name for name in names if not name.startswith("backbone")]
            note("gradient", [theirs[n] for n in heads], [ours[n] for n in heads])
            norms = [
                torch.stack([of[n].norm().cpu() for n in names]).norm() for of in (theirs, ours)
            ]
            note("gradient norm", norms[:1], [norms[1].numpy()])
        self.half, self.dropout, torch.backends.cudnn.allow_tf32 = kept
        return {name: max(values) for name, values in found.items()}


def tree(flat) -> dict:
    """Of arrays by names like params/dlc/...: {"params": {"dlc": ...}}."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


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


def answer(peer: Peer, asked: dict) -> dict:
    if "prepare" in asked:
        return {"guidance": peer.prepare(asked["prepare"], asked["way"])}
    return {"groups": peer.groups(asked["groups"])} if "groups" in asked else peer.seconds(**asked)


def main(folder: str) -> None:
    torch.backends.cudnn.benchmark = True
    root = pathlib.Path(folder)
    settings = json.loads((root / "settings.json").read_text())
    if threads := settings.get("threads"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    peer = Peer(root)
    differences = peer.differences(np.load(root / "expected.npz"))
    print(json.dumps({"torch": torch.__version__, "differences": differences}), flush=True)
    for line in sys.stdin:
        try:
            said = answer(peer, json.loads(line))
        except Exception as error:  # a way that fails here is left out, with its reason
            said = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
