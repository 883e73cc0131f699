"""SGD with momentum, coupled weight decay and the poly schedule (section IV.B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax


def poly_schedule(learning_rate: float, power: float, steps: int) -> Callable[[Any], jax.Array]:
    """step -> learning_rate * (1 - step / steps) ** power, per iteration, 0 from `steps` on."""

    def schedule(step):
        step = jax.numpy.asarray(step, jax.numpy.result_type(float))  # float64 where enabled
        return learning_rate * jax.numpy.maximum(1 - step / steps, 0) ** power

    return schedule


def scale_new_layers(multiplier: float) -> optax.GradientTransformation:
    """Multiplies the updates of all but `backbone`: a higher learning rate for new layers."""

    def update(updates, _):
        return {
            name: part
            if name == "backbone"
            else jax.tree.map(lambda u: u * jax.numpy.asarray(multiplier, u.dtype), part)
            for name, part in updates.items()
        }

    return optax.stateless(update)


def create(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """`config.optimizer` -> update rule of PyTorch's SGD with two learning rates.

    d = clip(gradient) + weight_decay * w, for every parameter (BN and bias too, as the code does);
    v = momentum * v + d;  w = w - poly(step) * (1 or new_layer_multiplier) * v.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.trace(config.momentum),
        scale_new_layers(config.new_layer_multiplier),
        optax.scale_by_learning_rate(poly_schedule(config.learning_rate, config.power, steps)),
    )
