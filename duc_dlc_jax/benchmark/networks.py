"""The training step of several networks, and of the configured one under several XLA options."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import ml_collections

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.benchmark import model
from duc_dlc_jax.config import ConfigError

_NAME = re.compile(r"(\d+)/(\d+)@(\d+)x(\d+)((?:\+[\w.]+=[\w.]+)*)")
_OPTION = re.compile(r"(xla_\w+)=(\w*)")

Options = dict[str, bool | str]


def network(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """`config` with depth, output stride, crop and batch of a name like 101/8@768x16.

    Other fields may follow: 50/32@480x16+model.remat=blocks+train.accumulate=2.

    Raises ConfigError for other names.
    """
    if not (found := _NAME.fullmatch(name)):
        raise ConfigError(
            f"--networks: {name!r} is not DEPTH/OUTPUT_STRIDE@CROPxBATCH[+FIELD=VALUE ...]"
        )
    changed = config.copy_and_resolve_references()
    depth, stride, side, batch = (int(number) for number in found.groups()[:4])
    changed.model.depth, changed.model.output_stride = depth, stride
    changed.data.crop_size, changed.train.batch_size = side, batch
    for change in found[5].split("+")[1:]:
        path, _, text = change.partition("=")
        config_lib.check_field_name(path)
        old = dict(config_lib.fields(config))[path]
        try:
            value = text if isinstance(old, str) else ast.literal_eval(text)
            changed.update_from_flattened_dict({path: value})
        except (SyntaxError, TypeError, ValueError) as error:
            raise ConfigError(f"--networks: {text!r} is no value of {path}, now {old!r}") from error
    config_lib.validate(changed)
    return changed


def option(text: str) -> Options:
    """{name: value} of an option of XLA's like xla_gpu_deterministic_ops=true.

    Raises ConfigError for other texts.
    """
    if not (found := _OPTION.fullmatch(text)):
        raise ConfigError(f"--xla_options: {text!r} is not xla_NAME=VALUE")
    name, value = found.groups()
    return {name: value == "true" if value in ("true", "false") else value}


def plan(
    config: ml_collections.ConfigDict, names: Sequence[str], options: Sequence[str]
) -> dict[str, tuple[ml_collections.ConfigDict, Options]]:
    """{option or name: configuration and options of XLA of its program}, the options first.

    Raises ConfigError for names that are none.
    """
    programs = {text: (config, option(text)) for text in options}
    return programs | {name: (network(config, name), {}) for name in names}


def timed(
    base: model.Work, config: ml_collections.ConfigDict, options: Options, calls: int, rounds: int
) -> dict[str, Any]:
    """The figures of `model.timed_step`, or {failed: why}.

    For want of memory, or of an option that this XLA knows.
    """
    try:
        same = config is base.config
        work = base if same else model.Work(config, ceilings=base.ceilings)
        return model.timed_step(work, work.step(options or None), calls, rounds)
    except RuntimeError as error:  # XLA's are
        return failed(error)


def failed(error: RuntimeError) -> dict[str, Any]:
    return {"failed": str(error).splitlines()[0][:300]}
