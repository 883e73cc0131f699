"""Every configuration field, its default and its unit; `configs/*.py` change a few of them.

Fields marked [I] are inferences about the paper rather than its own words (see docs/network.md);
[C] marks facts of the code base that the paper's hyper-parameters come from.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import numbers
import re
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

CHOICES = {
    "data.flip": ("left_right", "up_down", "none"),
    "data.bad_records": ("error", "mask"),
    "model.depth": (14, 26, 50, 101, 152, 269),
    "model.stem": ("plain", "deep", "narrow"),
    "model.stride_on": ("3x3", "1x1"),
    "model.output_stride": (32, 16, 8),
    "model.resize_grid": ("corners", "stride", "half_pixel"),
    "model.upsampling": (
        "duc",
        "none",
        "bilinear",
        "dupsampling",
        "guided_filter",
        "pixel_shuffle",
        "jpu",
    ),
    "model.context": ("dlc", "none", "fcn", "aspp", "dense_aspp", "ccl", "psp"),
    "model.guidance_kernel": (3, 5),
    "model.guidance_stride": (1, 2),
    "model.duc_upsampled": ("features", "coefficients", "output"),
    "model.dtype": ("float32", "bfloat16", "float64"),
    "model.bn_groups": ("global", "host", "device"),
    "model.bn_running_variance": ("biased", "unbiased"),
    "model.bn_padding": ("counted", "masked"),
    "model.remat": ("none", "blocks", "all"),
    "loss.class_balance": ("none", "inverse_log", "median_frequency"),
    "optimizer.name": ("sgd", "adamw"),
    "eval.mode": ("whole", "sliding", "source_code"),
    "eval.average": ("softmax", "exp_sum"),
}

RANGES = {  # of every number that has no choices, and of each element of a tuple
    "whole numbers in [0, inf)": """
        data.crop_width data.workers eval.crop_size eval.long_side eval.pictures eval.stride
        init.dupsampling_blocks loss.ohem_min_kept model.context_width optimizer.warmup_steps
        train.eval_every train.keep_best train.steps
    """,
    "whole numbers in [1, inf)": """
        data.base_size data.crop_size data.prefetch data.threads eval.batch_size eval.pad_sides
        mesh.space model.context_rates model.dlc_growth model.dlc_rates model.dlc_width
        model.duc_dilation model.duc_width model.dupsampling_width model.guidance_width model.width
        train.accumulate train.batch_size train.checkpoint_every train.keep_latest train.log_every
    """,
    "whole numbers in [-1, inf)": "mesh.data",
    "whole numbers in [0, 4294967295]": "seed",
    "numbers in [0, 1]": """
        data.blur_probability data.class_uniform_share data.photometric_probability
        loss.label_smoothing loss.ohem_threshold model.bn_momentum
    """,
    "numbers in [0, 1)": """
        model.dropout optimizer.adam_betas optimizer.ema_decay optimizer.momentum
    """,
    "numbers in [0, 180]": "data.rotate_degrees",
    "numbers in [0, inf)": """
        loss.aux_weight loss.class_weights optimizer.clip_norm optimizer.learning_rate
        optimizer.new_layer_multiplier optimizer.power optimizer.weight_decay train.epochs
    """,
    "numbers in (0, inf)": """
        data.scale_max data.scale_min eval.scales model.bn_epsilon optimizer.adam_epsilon
    """,
}


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what to change."""


def default() -> ml_collections.ConfigDict:
    """Returns the paper's recipe: ResNet-50 + DUC + DLC, SGD + poly, 480x480 crops, batch 16."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # parameters, dropout, record order and augmentation all derive from it
    c.profile = ""  # folder for a profiler trace of five steps, TensorBoard's and Perfetto's

    c.data = ml_collections.ConfigDict()
    c.data.name = ""  # a prepared data set: camvid, cityscapes, ade20k, pascal_context, scenes
    c.data.dir = "data"  # what `duc_dlc_jax.data.prepare --data_dir` wrote, s3:// and gs:// too
    c.data.staging_dir = ""  # records in an object store are copied here; "" = the user's cache
    c.data.train_split = "train"
    c.data.eval_split = "val"
    c.data.base_size = 520  # pixels on the short side that the random scale multiplies [C]
    c.data.crop_size = 480  # pixels: rows, and columns unless crop_width says otherwise
    c.data.crop_width = 0  # pixels; 0 = crop_size. 1024 and 2048 train on whole Cityscapes images
    c.data.scale_min = 0.5
    c.data.scale_max = 2.0
    c.data.flip = "left_right"  # left_right [C], up_down (the paper's word "vertical"), none
    c.data.antialias = False  # low-pass when shrinking, as PIL does and OpenCV does not
    c.data.blur_probability = 0.0  # Gaussian blur, radius uniform in 0..1 pixel; the code: 0.5 [C]
    c.data.rotate_degrees = 0.0  # uniform in +-this; the code: 10 for Cityscapes [C]
    c.data.photometric_probability = 0.0  # of each of brightness, contrast, saturation and hue
    c.data.class_uniform_share = 0.0  # of the crops, drawn around a pixel of a random class
    c.data.bad_records = "error"  # error, or mask: an unreadable image becomes ignored pixels
    c.data.workers = 0  # decoding processes on this host; 0 decodes in threads of the trainer
    c.data.threads = 2  # reading threads per process
    c.data.prefetch = 2  # batches kept ready
    c.data.in_memory = False  # keep decoded images; for sets that fit
    c.data.on_device = False  # keep them on every device, which cuts the crops; for small sets

    c.model = ml_collections.ConfigDict()
    c.model.depth = 50  # 50, 101, 152, 269; 14 and 26 are small variants for tests and the demo
    c.model.width = 64  # channels of the stem; the stages have 4, 8, 16, 32 times as many
    c.model.stem = "plain"  # plain: 7x7; three 3x3: deep (64, 64, 128) [I], narrow (32, 32, 64)
    c.model.stride_on = "3x3"  # which convolution of a stage's first block strides: 3x3 or 1x1
    c.model.output_stride = 32  # 32, 16 or 8 [I]
    c.model.resize_grid = "corners"  # corners (align_corners=True [C]), stride or half_pixel [I]
    c.model.upsampling = "duc"  # or what the paper compares it with: docs/network.md
    c.model.context = "dlc"  # likewise
    c.model.duc_width = 512  # channels of G~, I~, a, b and O [I]; of I~ and JPU elsewhere
    c.model.duc_dilation = 2  # of the 3x3 on I_l [I]
    c.model.guidance_width = 64  # channels of g(I) [I]
    c.model.guidance_kernel = 3  # stride-4 convolution on G_h: 3; 5 covers every pixel [I]
    c.model.guidance_stride = 1  # 1: g(I) at full resolution; 2: on the half-resolution image [I]
    c.model.duc_upsampled = "features"  # to I_m's grid: features (I~), coefficients, output (O) [I]
    c.model.commute_coefficients = True  # I~ half of the 1x1 before upsampling; same result
    c.model.dlc_width = 512  # channels after DLC's first 1x1 [I]
    c.model.dlc_growth = 128  # channels of each dilated branch [I]
    c.model.dlc_rates = (3, 6, 12, 18)
    c.model.context_width = 0  # of contexts other than DLC; 0 = as published
    c.model.context_rates = ()  # of aspp, dense_aspp and ccl; () = as published
    c.model.dupsampling_width = 64  # numbers per cell that DUpsampling's W reads
    c.model.dropout = 0.1  # of whole channels, before the classifier [C]
    c.model.aux_head = False  # FCN head on layer3 [C]
    c.model.dtype = "float32"  # compute: float32, bfloat16, float64; parameters stay float32
    c.model.bn_momentum = 0.9  # Flax's sense: running = 0.9 running + 0.1 batch
    c.model.bn_epsilon = 1e-5
    c.model.bn_groups = "global"  # statistics over: global (the whole batch), host or device
    c.model.backbone_frozen = False  # neither its parameters nor its statistics change
    c.model.bn_frozen = False  # use and keep the running statistics in training
    c.model.bn_running_variance = "biased"  # biased (Flax) or unbiased (PyTorch)
    c.model.bn_padding = "counted"  # padding of crops in the statistics: counted [C] or masked
    c.model.remat = "none"  # activations computed again in the backward pass: none, blocks, all

    c.init = ml_collections.ConfigDict()
    c.init.weights = ""  # backbone: a name or a file, docs/conversion.md; empty = from scratch
    c.init.source = ""  # what the file cannot say; docs/conversion.md
    c.init.checkpoint = ""  # a workdir whose best network to start from, classes by name
    c.init.dupsampling_blocks = 1000  # of labels that DUpsampling's W starts from; 0 = at random

    c.loss = ml_collections.ConfigDict()
    c.loss.aux_weight = 0.2  # used with model.aux_head [C]
    c.loss.class_weights = ()  # one per class, in the order of the train ids; () = 1 each
    c.loss.class_balance = "none"  # or weights from the training split's pixels: inverse_log, ...
    c.loss.label_smoothing = 0.0  # share of the target that all classes divide evenly
    c.loss.ohem_threshold = 0.0  # only pixels whose label has less probability count; 0 = all
    c.loss.ohem_min_kept = 100_000  # pixels per image that count at least, over the batch

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "sgd"  # sgd, adamw
    c.optimizer.learning_rate = 1e-3
    c.optimizer.new_layer_multiplier = 10.0  # learning rate of everything but the backbone [C]
    c.optimizer.multipliers = ()  # "PATH=FACTOR": of parts by the beginning of their names
    c.optimizer.warmup_steps = 0  # linear, before and times poly
    c.optimizer.power = 0.9  # poly: (1 - step / steps) ** power
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 1e-4  # sgd: coupled, added to the gradient; adamw: decoupled
    c.optimizer.decay_kernels_only = False  # else BN's scale and bias, and biases, decay too [C]
    c.optimizer.adam_betas = (0.9, 0.999)
    c.optimizer.adam_epsilon = 1e-8
    c.optimizer.clip_norm = 0.0  # global gradient norm; 0 = off
    c.optimizer.ema_decay = 0.0  # of parameters and BN statistics; 0 = off

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices that a batch is split over; -1 = all that mesh.space leaves
    c.mesh.space = 1  # devices that the rows of each image are split over, in training

    c.train = ml_collections.ConfigDict()
    c.train.batch_size = 16  # images a step, over all devices
    c.train.accumulate = 1  # parts that a step takes its batch in, one after the other
    c.train.epochs = 120.0
    c.train.steps = 0  # > 0 replaces epochs
    c.train.log_every = 50  # steps
    c.train.eval_every = 0  # steps; 0 = only at the end
    c.train.checkpoint_every = 500  # steps
    c.train.keep_latest = 2  # checkpoints
    c.train.keep_best = 1  # checkpoints, by Final Score
    c.train.deterministic = False  # GPU: the same bits in every run, slower; docs/training.md

    c.eval = ml_collections.ConfigDict()
    c.eval.batch_size = 1  # images a device, of one size
    c.eval.pictures = 4  # images written beside their labels and predictions at each evaluation
    c.eval.mode = "whole"  # whole, sliding windows, source_code (its windows); docs/evaluation.md
    c.eval.scales = (1.0,)  # of the image's own size
    c.eval.flip = False  # with the mirrored image too
    c.eval.average = "softmax"  # of windows, flips and scales: softmax or exp_sum [C]
    c.eval.crop_size = 0  # pixels of a window; 0 = data.crop_size
    c.eval.stride = 0  # pixels between windows; 0 = two thirds of the window [C]
    c.eval.long_side = 0  # pixels of the long side at scale 1; 0 = as it is; the code: 520 [C]
    c.eval.pad_sides = ()  # sides to pad images to; () = planned where there are more than 12 sizes
    return c.lock()


def crop_shape(data: ml_collections.ConfigDict) -> tuple[int, int]:
    """Height and width in pixels of the training crops of `config.data`."""
    return data.crop_size, data.crop_width or data.crop_size


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.batch_size", 16) and so on, for every field."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(name for name, _ in fields(default()))


def check_field_name(path: str) -> None:
    """Raises ConfigError with the nearest valid name unless `path` ("train.epochs") is a field."""
    names = _names()
    if group := [name for name in names if name.startswith(f"{path}.")]:
        raise ConfigError(f"{path} is a group of fields: {', '.join(group)}")
    if path not in names:
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown configuration field {path}; the nearest one is {near}")


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for unknown fields and for values outside their choices or ranges."""
    values = dict(fields(config))
    for name in values:
        check_field_name(name)
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name}={values[name]!r}; allowed: {', '.join(map(repr, allowed))}")
    for allowed, names in RANGES.items():
        for name in names.split():
            _check_range(name, values[name], allowed)
    _check_tuples(values)
    _check_together(values)


def _check_range(name: str, value: Any, allowed: str) -> None:
    """allowed: a key of `RANGES`."""
    kind, _, interval = allowed.partition(" in ")
    low, high = (float(end) for end in interval[1:-1].split(","))
    ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
    type_: Any = numbers.Integral if kind == "whole numbers" else numbers.Real
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, type_) or not (low < number < high or number in ends):
            raise ConfigError(f"{name}={value!r}; allowed: {allowed}")


def _check_tuples(values: dict[str, Any]) -> None:
    for name in ("eval.scales", "model.dlc_rates"):
        if not values[name]:
            raise ConfigError(f"{name}=(); it must not be empty")
    for name in ("model.dlc_rates", "model.context_rates"):
        if len(set(values[name])) < len(values[name]):
            raise ConfigError(f"{name}={values[name]}; each rate may be there once")
    betas, weights = values["optimizer.adam_betas"], values["loss.class_weights"]
    if len(betas) != 2:
        raise ConfigError(f"optimizer.adam_betas={betas}; allowed: two numbers, as (0.9, 0.999)")
    if weights and not any(weights):
        raise ConfigError(f"loss.class_weights={weights}; one of them must be positive")
    for multiplier in values["optimizer.multipliers"]:
        if not _is_multiplier(multiplier):
            raise ConfigError(
                f"optimizer.multipliers: {multiplier!r}; allowed: PATH=FACTOR, as in classifier=20"
            )


def _is_multiplier(text: Any) -> bool:
    path, _, factor = str(text).partition("=")
    try:
        return bool(path) and 0 <= float(factor) < float("inf")
    except ValueError:
        return False


def _check_together(values: dict[str, Any]) -> None:
    """Fields that fit alone and not with each other."""
    width = values["model.context_width"]
    if width % 4:
        raise ConfigError(f"model.context_width={width}; allowed: multiples of 4, 0 as published")
    upsampled = values["model.duc_upsampled"]
    if upsampled != "features" and not values["model.commute_coefficients"]:
        raise ConfigError(
            f"model.duc_upsampled={upsampled!r} and model.commute_coefficients=False are both set: "
            "I~ is then not upsampled, so there is no order to choose. Use "
            "model.commute_coefficients=True, or model.duc_upsampled='features'"
        )
    if values["data.scale_max"] < values["data.scale_min"]:
        raise ConfigError(
            f"data.scale_max={values['data.scale_max']} is below "
            f"data.scale_min={values['data.scale_min']}"
        )
    if values["data.on_device"]:
        for name in ("blur_probability", "rotate_degrees", "photometric_probability"):
            if values[f"data.{name}"]:
                raise ConfigError(
                    f"data.{name}={values[f'data.{name}']} and data.on_device are both set: "
                    "devices resize, flip, pad and cut, no more. Use data.on_device=False with "
                    "data.in_memory or data.workers"
                )
    if values["init.weights"] and values["init.checkpoint"]:
        raise ConfigError("init.weights and init.checkpoint are both set: keep one of them")
    if values["train.accumulate"] > 1 and values["loss.ohem_threshold"]:
        raise ConfigError(
            f"train.accumulate={values['train.accumulate']} and loss.ohem_threshold="
            f"{values['loss.ohem_threshold']} are both set: which pixels of a batch are its "
            "hardest is known only when all of it is there. Use train.accumulate=1, and "
            "model.remat='all' where memory is short"
        )
    if not (values["train.steps"] > 0 or values["train.epochs"] > 0):
        raise ConfigError("train.steps and train.epochs are both 0: set one of them")


def split_argument(path: str) -> tuple[str, list[str]]:
    """A file of a configuration, and the argument of its get_config if there is one.

    Folders may have colons in their names, as times of day have.
    """
    stem, found, argument = path.partition(".py:")
    return (f"{stem}.py", [argument]) if found else (path, [])


def find(path: str) -> str:
    """`path`, or the configuration of that name that comes with the package.

    What follows a colon is left there: `configs/paper.py:ade20k_r101`, the argument of get_config.

    Raises ConfigError, with the names that exist, where there is neither.
    """
    package = Path(__file__).parent
    folders = [package / "configs", package.parent / "configs"]
    file, argument = split_argument(path)
    for candidate in [Path(file), *(folder / Path(file).name for folder in folders)]:
        if candidate.is_file():
            return ":".join([str(candidate), *argument])
    names = sorted({f"configs/{p.name}" for folder in folders for p in folder.glob("*.py")})
    raise ConfigError(f"no configuration file {path}; with the package come {', '.join(names)}")


def load(path: str) -> ml_collections.ConfigDict:
    """The configuration of a file, as `read`, validated."""
    config = read(path)
    validate(config)
    return config


def read(path: str) -> ml_collections.ConfigDict:
    """What the `get_config` of a file returns; it gets what follows a colon, as `find` says.

    Raises ConfigError, with the file and the line, for an error in it.
    """
    file, argument = split_argument(find(path))
    with errors_of(file):
        return runpy.run_path(file)["get_config"](*argument)


@contextlib.contextmanager
def errors_of(file: str) -> Iterator[None]:
    """Around what runs code of a configuration file: its errors are ConfigErrors of one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_in_file(error, file)) from error


def _in_file(error: Exception, file: str) -> str:
    """An error of a configuration file in one line."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
    if isinstance(error, KeyError) and not lines:
        return f"{file} has no function get_config(); see configs/ for files that do"
    said: Any = error
    while isinstance(said, AttributeError | KeyError | SyntaxError) and said.args:
        said = said.args[0]
    # ConfigDict adds all of its fields and values, over several lines.
    said, _, fields_and_hint = str(said).partition("Other fields present:")
    hint = re.search(r"Did you mean [^?]*\?", fields_and_hint)
    text = " ".join(f"{said} {hint[0] if hint else ''}".split())
    return f"{file}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {text}"


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text: str) -> ml_collections.ConfigDict:
    """What `to_json` wrote; fields that newer versions added have their defaults."""
    config = default()
    for name, value in fields(ml_collections.ConfigDict(json.loads(text))):
        check_field_name(name)
        section, _, field = name.rpartition(".")
        target = config[section] if section else config
        target[field] = tuple(value) if isinstance(target[field], tuple) else value
    return config
