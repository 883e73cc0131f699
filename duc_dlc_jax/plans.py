"""From what two folders hold and the machine at hand to a configuration, every choice with its why.

Network    With weights the ResNet that they belong to, with a run to start from its network, else
           the small network of configs/demo.py on a CPU and a ResNet-50 from scratch on an
           accelerator.
Crop       The median short side, rounded down to a multiple of 32; at most 480, on a CPU 256.
Batch      The power of two per device that fits the memory by `counts.activation_bytes`; at most
           16 in all, on a CPU also 4 per core.
Rate       2e-3 with weights (10 times that for new layers), in proportion below a batch of 8; 2e-2
           from scratch, in proportion below a batch of 16.
Steps      40 epochs, but 2,000 at least and 40,000 at most; on a CPU 400.
Evaluation Val images of more than 4 sizes are padded to at most 9, which changes no result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from etils import epath

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import sharding, train_step, workdirs
from duc_dlc_jax.benchmark import model as speed
from duc_dlc_jax.data.folders import Inspection
from duc_dlc_jax.models import counts, pretrained, segmenter
from duc_dlc_jax.models import weights as weights_lib
from duc_dlc_jax.progress import clock

EPOCHS, FEWEST_STEPS, MOST_STEPS, CPU_STEPS = 40, 2000, 40000, 400
MOST_BATCH, CPU_BATCH_PER_CORE = 16, 4
MOST_CROP, MOST_CROP_CPU = 480, 256  # pixels
PAD_ABOVE = 4  # sizes of val images, each of which would be compiled
GIVEN = "given on the command line"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices to train on.

    Attributes:
      platform: cpu, gpu or tpu.
      kind: the devices' name.
      devices: number of them.
      memory: bytes that training may take on each: 4/5 of an accelerator's, or half of what is
        free in the host, shared by the CPU devices.
      host_memory: bytes free in the host.
      cores: of the host.
    """

    platform: str
    kind: str
    devices: int
    memory: int
    host_memory: int
    cores: int

    @classmethod
    def here(cls) -> Machine:
        devices, host = jax.devices(), free_bytes()
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        memory = int(limit * 0.8) if limit else host // 2 // len(devices)
        first = devices[0]
        cores = os.cpu_count() or 1
        return cls(first.platform, first.device_kind, len(devices), memory, host, cores)

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    def __str__(self) -> str:
        cores = f" with {self.cores} cores" if self.is_cpu else ""
        return f"{self.devices} x {self.kind}{cores}, {_size(self.memory)} for training on each"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration, and why its fields are what they are."""

    config: ml_collections.ConfigDict
    why: dict[str, str]  # by field, of the fields that were chosen
    machine: Machine
    classes: int

    def lines(self) -> list[str]:
        """Returns the chosen fields as lines of text."""
        values = dict(config_lib.fields(self.config))
        return [f"  {f:<31} {values[f]!s:<18} {why}" for f, why in self.why.items()]


def make(
    found: Inspection, machine: Machine, given: Mapping[str, Any], most_batch: int = MOST_BATCH
) -> Plan:
    """Plans the training on what was found.

    Args:
      found: the images and their label contract.
      machine: what to train on.
      given: fields by name ("train.steps") that are not to be chosen here.
      most_batch: images a step at most.

    Raises:
      ConfigError: a given value outside its range; weights that cannot be had or read.
      FileNotFoundError: no such file of weights.
    """
    draft = _Draft(given)
    segmenter.enable_dtype(draft.config.model)
    draft.put("data.name", found.spec.name, "the name of these folders")
    _network(draft, machine)
    _crop(draft, found, machine)
    _batch(draft, found, machine, most_batch)
    _schedule(draft, found, machine)
    _evaluation(draft, found)
    for name, value in given.items():
        draft.put(name, value, GIVEN)
    config_lib.validate(draft.config)
    train = draft.config.train
    sharding.check_batch(train.batch_size, machine.devices, train.accumulate)
    return Plan(draft.config.lock(), draft.why, machine, found.spec.num_classes)


class _Draft:
    """A configuration being filled; what was given beforehand stays."""

    def __init__(self, given: Mapping[str, Any]):
        self.config, self.why, self._given = config_lib.default(), {}, given
        for name in given:
            config_lib.check_field_name(name)
        self.config.update_from_flattened_dict(dict(given))

    def put(self, name: str, value: Any, why: str) -> None:
        given = name in self._given
        self.why[name] = GIVEN if given else why
        if not given:
            self.config.update_from_flattened_dict({name: value})


def _network(draft: _Draft, machine: Machine) -> None:
    weights, model = draft.config.init.weights, draft.config.model
    if weights:
        if weights not in weights_lib.TABLE:
            weights = str(weights_lib.find(weights)[0].resolve())
        layout, source = pretrained.inspect(weights, draft.config.init.source)
        draft.put("init.weights", weights, GIVEN)
        draft.config.init.weights = weights
        draft.put("init.source", source, "assumed: a file does not say where it is from")
        for field, value in pretrained.model_fields(layout, source).items():
            if model[field] != value:
                draft.put(f"model.{field}", value, f"weights of {source}")
        draft.put("model.depth", layout.depth() or model.depth, f"the weights {Path(weights).name}")
        _check_weights(draft.config)
    elif draft.config.init.checkpoint:
        _network_of(draft, epath.Path(draft.config.init.checkpoint).expanduser().resolve())
    elif machine.is_cpu:
        small = config_lib.load("configs/demo.py").model
        for name, value in config_lib.fields(small, "model."):
            if value != model[name.removeprefix("model.")]:
                draft.put(name, value, "that of configs/demo.py: a CPU and no --weights")
    else:
        draft.put("model.depth", 50, "from scratch; --weights would do better")
    if not machine.is_cpu:
        draft.put("model.dtype", "bfloat16", "faster on accelerators; parameters stay float32")


def _network_of(draft: _Draft, workdir: epath.Path) -> None:
    """The network of another run, which training then starts from."""
    trained, *_ = workdirs.description(workdir)
    draft.put("init.checkpoint", str(workdir), GIVEN)
    draft.config.init.checkpoint = str(workdir)
    for name, value in config_lib.fields(trained.model, "model."):
        if value != dict(config_lib.fields(config_lib.default().model, "model."))[name]:
            draft.put(name, value, f"the network in {workdir.name}")


def _check_weights(config) -> None:
    """Loads the weights once, so that wrong ones end here and not after preparing."""
    variables = train_step.init_variables(segmenter.create(config.model, 2), config.seed)
    init = config.init
    pretrained.load_backbone(init.weights, init.source, **variables, model_config=config.model)


def _crop(draft: _Draft, found: Inspection, machine: Machine) -> None:
    draft.put("data.base_size", found.short_side(), "median short side of the training images")
    most = MOST_CROP_CPU if machine.is_cpu else MOST_CROP
    crop = max(32, min(most, draft.config.data.base_size // 32 * 32))
    draft.put("data.crop_size", crop, f"a multiple of 32 within base_size, at most {most}")
    pixels = sum(h * w for split in found.scans for h, w in found.sizes(split))
    fits = 4 * pixels < machine.host_memory // 8
    if machine.is_cpu:
        draft.put("data.in_memory", fits, f"decoded, the images take {_size(4 * pixels)}")
    else:
        draft.put("data.workers", max(1, min(8, machine.cores - 1)), "cores, at most 8")


def _batch(draft: _Draft, found: Inspection, machine: Machine, most: int) -> None:
    config = draft.config
    model = segmenter.create(config.model, found.spec.num_classes)
    state = train_step.state_bytes(model, config)
    image = counts.activation_bytes(model, *config_lib.crop_shape(config.data))
    if machine.is_cpu:
        most = min(most, CPU_BATCH_PER_CORE * machine.cores)
    fit = min((machine.memory - state) // image, most // machine.devices)
    batch = machine.devices * 2 ** int(math.log2(max(fit, 1)))
    need = _size(state + image * batch // machine.devices)
    draft.put("train.batch_size", batch, f"about {need} on each device")


def _schedule(draft: _Draft, found: Inspection, machine: Machine) -> None:
    config, images = draft.config, found.counts["train"]
    batch = config.train.batch_size
    if config.init.weights or config.init.checkpoint:
        rate, why = 2e-3 * min(1, batch / 8), "2e-3, in proportion below a batch of 8"
    else:
        rate, why = 2e-2 * min(1, batch / 16), "from scratch: 2e-2, in proportion below 16 images"
        draft.put("optimizer.new_layer_multiplier", 1.0, "from scratch all layers are new")
    draft.put("optimizer.learning_rate", round(rate, 6), why)
    steps = min(max(math.ceil(EPOCHS * images / batch), FEWEST_STEPS), MOST_STEPS)
    rule = f"{EPOCHS} epochs of {images} images, within {FEWEST_STEPS}..{MOST_STEPS}"
    steps, rule = (CPU_STEPS, "a short run for a CPU") if machine.is_cpu else (steps, rule)
    draft.put("train.steps", steps, rule)
    steps = config.train.steps
    draft.put("train.eval_every", max(steps // 5, 1), "five evaluations")
    draft.put("train.log_every", max(min(50, steps // 20), 1), "a 20th of the run, at most 50")
    draft.put("train.checkpoint_every", max(min(500, steps // 10), 1), "a 10th, at most 500")


def _evaluation(draft: _Draft, found: Inspection) -> None:
    sizes = set(found.sizes("val"))
    small = len(sizes) == 1 and math.prod(next(iter(sizes))) <= 512 * 512
    why = "val images of one size" if small else f"val images of {len(sizes)} sizes"
    draft.put("eval.batch_size", 4 if small else 1, why)
    if len(sizes) > PAD_ABOVE:
        sides = sorted(side for size in sizes for side in size)
        thirds = (sides[math.ceil(len(sides) * part / 3) - 1] for part in (1, 2, 3))
        padded = tuple(sorted({-(-side // 32) * 32 for side in thirds}))
        draft.put("eval.pad_sides", padded, f"at most {len(padded) ** 2} programs for their sizes")


def step_seconds(plan: Plan) -> float | None:
    """Seconds of one training step, measured; None where measuring would take long.

    Long: more than 1 TFLOP a step on a CPU, 100 elsewhere. The compiled program is the one that
    training uses, so that with a compilation cache its time is not lost.

    Raises:
      MemoryError: the step does not fit the device.
    """
    config, mesh = plan.config, sharding.training_mesh(plan.config)
    model = segmenter.create(config.model, plan.classes, sharding.bn_groups(config, mesh))
    size = config_lib.crop_shape(config.data)
    flops = 6 * sum(counts.macs(model, *size).values()) * config.train.batch_size
    if flops > (1e12 if plan.machine.is_cpu else 1e14):
        return None
    data, variables = speed.random_batch(config, plan.classes), train_step.init_variables(model, 0)
    try:
        return speed.time_train_step(config, model, mesh, variables, data, 1)[0]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"a batch of {config.train.batch_size} needs too much memory") from error


def expected(plan: Plan, seconds: float | None) -> str:
    """Writes how long training takes, without the evaluations."""
    if seconds is None:
        return "unknown: a step takes too long to measure it here; the progress line will say"
    steps = plan.config.train.steps
    return f"{clock(steps * seconds)} for {steps} steps of {seconds:.2f} s, evaluations not counted"


def source_text(plan: Plan, notes: str) -> str:
    """Returns the plan as a configuration file; `notes` become its docstring."""
    values = dict(config_lib.fields(plan.config))
    lines = []
    for name, why in plan.why.items():
        value = json.dumps(values[name]) if isinstance(values[name], str) else repr(values[name])
        lines.append(f"    config.{name} = {value}  # {why}")
    escaped = notes.replace("\\", "\\\\").replace('"""', "'''")
    body = "\n".join(lines)
    return f'''"""{escaped}
"""

import pathlib

from duc_dlc_jax import config as base


def get_config():
    config = base.default()
    config.data.dir = str(pathlib.Path(__file__).resolve().parent / "data")
{body}
    return config
'''


def free_bytes() -> int:
    """Returns the memory of the host that is free for use, bytes, within the control group's."""
    limits = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(int(rows["MemAvailable"].split()[0]) * 1024)
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits, default=4 * 2**30)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
