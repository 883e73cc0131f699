"""SGD with momentum, coupled weight decay and the poly schedule (section IV.B); or AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import optax

from duc_dlc_jax.config import ConfigError


def total_steps(
    config: ml_collections.ConfigDict, images: int, step: int = 0, position: int = 0
) -> int:
    """train.steps, or train.epochs x images / batch_size rounded up (batches cross epochs).

    position: images consumed in the first `step` steps, in batches of this size or another.
    """
    if config.train.steps > 0:
        return config.train.steps
    size = config.train.batch_size
    return math.ceil((config.train.epochs * images + (step * size - position)) / size)


def poly_schedule(
    learning_rate: float, power: float, steps: int, warmup_steps: int = 0
) -> Callable[[Any], jax.Array]:
    """step -> learning_rate * (1 - step / steps) ** power, per iteration, 0 from `steps` on.

    Of the first `warmup_steps` steps the i-th, from 1, takes i / warmup_steps of it.
    """

    def schedule(step):
        step = jax.numpy.asarray(step, jax.numpy.result_type(float))  # float64 where enabled
        rate = learning_rate * jax.numpy.maximum(1 - step / steps, 0) ** power
        if warmup_steps:
            rate = rate * jax.numpy.minimum((step + 1) / warmup_steps, 1)
        return rate

    return schedule


def scale_parts(new_layers: float, multipliers: Sequence[str] = ()) -> optax.GradientTransformation:
    """Multiplies updates: by `new_layers` those of all but `backbone`, and then some by name.

    multipliers: "backbone/layer4=0.5" replaces the factor of each parameter whose path begins so;
    of several the longest counts. Raises ConfigError, when the parameters are seen, for a name that
    is the beginning of none.
    """
    named = {name: float(factor) for name, _, factor in (m.partition("=") for m in multipliers)}

    def factor(path: str) -> float:
        found = [name for name in named if path.startswith(name)]
        if found:
            return named[max(found, key=len)]
        return 1.0 if path.startswith("backbone/") else new_layers

    def update(updates, _):
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        paths = ["/".join(entry.key for entry in path) for path, _ in leaves]
        for name in named:
            if not any(path.startswith(name) for path in paths):
                raise ConfigError(
                    f"optimizer.multipliers: no parameter's path begins with {name!r}; the parts "
                    f"are {', '.join(updates)}"
                )
        factors = [factor(path) for path in paths]
        scaled = [
            leaf if by == 1 else leaf * jax.numpy.asarray(by, leaf.dtype)
            for (_, leaf), by in zip(leaves, factors, strict=True)
        ]
        return jax.tree.unflatten(tree, scaled)

    return optax.stateless(update)


def guarded(
    rule: optax.GradientTransformation, read: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """`rule` that keeps its state where the argument `finite` of its update, a bool, is False.

    read: the updates, from the new state. The parameters are then computed from what was stored,
    behind a barrier: otherwise XLA computes it twice, from old values, and so copies the momentum
    and the parameters before it overwrites them (a CPU's program, R50: 287 MB a step).
    """

    def update(updates, state, params=None, *, finite=True, **_):
        updates, new = rule.update(updates, state, params)
        new = jax.tree.map(lambda new, old: jax.numpy.where(finite, new, old), new, state)
        if read is not None:
            new = jax.lax.optimization_barrier(new)
            updates = read(new)
        return updates, new

    return optax.GradientTransformationExtraArgs(rule.init, update)


def create(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformationExtraArgs:
    """`config.optimizer` -> update rule of PyTorch's SGD or AdamW with a rate for each part.

    d = clip(gradient); rate = schedule(step) * the part's multiplier. Decay concerns every
    parameter (BN and bias too, as the code does), or kernels alone with `decay_kernels_only`.

    sgd: v = momentum * v + d + weight_decay * w;  w = w - rate * v.
    adamw: w = w - rate * (m / (sqrt(v) + epsilon) + weight_decay * w), m and v the bias-corrected
    means of d and d^2.

    Its update takes `finite`, a bool scalar: where it is False the state stays as it was.
    """
    mask = _kernels if config.decay_kernels_only else None
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    if config.name == "adamw":
        rule = (guarded(optax.scale_by_adam(*config.adam_betas, eps=config.adam_epsilon)), decay)
    else:
        rule = (decay, guarded(optax.trace(config.momentum), read=lambda state: state.trace))
    schedule = poly_schedule(config.learning_rate, config.power, steps, config.warmup_steps)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        *rule,
        scale_parts(config.new_layer_multiplier, config.multipliers),
        guarded(optax.scale_by_learning_rate(schedule)),
    )
    return optax.with_extra_args_support(chain)


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
