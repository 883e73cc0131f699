"""The training step of several networks, and of the configured one under several XLA options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from duc_dlc_jax.benchmark import model
from duc_dlc_jax.config import ConfigError

_NAME = re.compile(r"(\d+)/(\d+)@(\d+)x(\d+)")
_OPTION = re.compile(r"(xla_\w+)=(\w*)")


def network(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """`config` with depth, output stride, crop and batch of a name like 101/8@768x16.

    Raises ConfigError for other names.
    """
    if not (found := _NAME.fullmatch(name)):
        raise ConfigError(f"--networks: {name!r} is not DEPTH/OUTPUT_STRIDE@CROPxBATCH")
    changed = config.copy_and_resolve_references()
    depth, stride, side, batch = (int(number) for number in found.groups())
    changed.model.depth, changed.model.output_stride = depth, stride
    changed.data.crop_size, changed.train.batch_size = side, batch
    return changed


def option(text: str) -> dict[str, bool | str]:
    """{name: value} of an option of XLA's like xla_gpu_deterministic_ops=true.

    Raises ConfigError for other texts.
    """
    if not (found := _OPTION.fullmatch(text)):
        raise ConfigError(f"--xla_options: {text!r} is not xla_NAME=VALUE")
    name, value = found.groups()
    return {name: value == "true" if value in ("true", "false") else value}


def timed(
    base: model.Work, names: Sequence[str], options: Sequence[str], calls: int, rounds: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compiles and times one program after another; base: the configured network's.

    Yields a name or an option, and the figures of `model.timed_step`, or {failed: why}: out of
    memory, or an option that this XLA does not know.

    Raises ConfigError, before anything is compiled, for names that are none.
    """
    configs = {name: network(base.config, name) for name in names}
    set_to: dict[str, dict[str, Any]] = {text: option(text) for text in options}
    for name in (*set_to, *configs):
        try:
            work = base
            if name in configs:
                work = model.Work(configs[name], ceilings=base.ceilings)
            step = work.step(set_to.get(name))
            yield name, model.timed_step(work, step, calls, rounds)
        except RuntimeError as error:  # XLA's are
            yield name, {"failed": str(error).splitlines()[0][:300]}
