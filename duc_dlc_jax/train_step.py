"""The train state and one pure training step."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from duc_dlc_jax import accumulation, losses
from duc_dlc_jax import optimizer as optimizers
from duc_dlc_jax.models.layers import Conv
from duc_dlc_jax.models.segmenter import Segmenter, variable_shapes

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; `ema` is {} or averaged {params, batch_stats}."""

    step: jax.Array  # int32 scalar: updates done
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def variables(self) -> dict[str, Any]:
        """What to evaluate: the averaged network if there is one, statistics included."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: Segmenter,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """State at step 0: from `variables` {params, batch_stats} or drawn from config.seed."""
    if variables is None:
        variables = init_variables(model, config.seed)
    params, batch_stats = variables["params"], variables["batch_stats"]
    ema = {"params": params, "batch_stats": batch_stats} if config.optimizer.ema_decay else {}
    ema = jax.tree.map(jnp.copy, ema)  # the state is donated: no buffer may appear twice
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, batch_stats, optimizer.init(params), ema)


def first_state(
    model: Segmenter, config: ml_collections.ConfigDict, variables: dict[str, Any] | None = None
) -> TrainState:
    """`create_state` for a training of any length: the optimizer's state knows of none."""
    return create_state(model, optimizers.create(config.optimizer, 1), config, variables)


def state_shapes(model: Segmenter, config: ml_collections.ConfigDict) -> TrainState:
    """The structure of the train state, in ShapeDtypeStructs."""
    create = functools.partial(first_state, model, config)
    return jax.eval_shape(create, variable_shapes(model))


def state_bytes(model: Segmenter, config: ml_collections.ConfigDict) -> int:
    """Bytes of the train state: parameters, momentum, statistics and, if kept, their average."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state_shapes(model, config)))


def init_variables(model: Segmenter, seed: int) -> dict[str, Any]:
    """Random {params, batch_stats}, drawn on the host by (seed, name): nothing is compiled.

    Convolutions have the distribution that their layer names, biases and means are 0, scales and
    variances 1.
    """
    inits = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, Conv):
            inits[context.module.path] = context.module.init
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes = variable_shapes(model)

    def draw(path, leaf) -> np.ndarray:
        names = tuple(entry.key for entry in path)  # (collection, module, ..., parameter)
        if names[-1] == "kernel":
            rng = np.random.default_rng([seed, zlib.crc32("/".join(names).encode())])
            return inits[names[1:-1]].draw(rng, leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, names[-1] in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_train_step(
    model: Segmenter,
    optimizer: optax.GradientTransformationExtraArgs,
    config: ml_collections.ConfigDict,
    pixels: Sequence[int] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, batch, seed) -> (state, metrics), to be jitted.

    batch: image, uint8 [B, H, W, 3], and label, uint8 [B, H, W]. seed: uint32.

    Batches may have an entry `valid`, int32 [B, 2]: height and width of the unpadded part of each
    image, in pixels. `model.bn_padding="masked"` needs it and raises ConfigError without.

    Loss and gradients are those of the mean over all labelled pixels of the global batch (PyTorch's
    data parallel averages the devices' means instead). Where the loss or the gradient is not finite
    the state stays as it was, its step included. pixels: of each class in the training split, for
    `loss.class_balance`. Metrics are float32 scalars: loss, grad_norm, PA (of the training batch).
    Dropout derives from `seed`, the configuration's, and the step. With `train.accumulate` the
    batch is taken in parts: `accumulation`.
    """
    chosen = losses.options(config.loss, model.num_classes, pixels)
    parts = config.train.accumulate

    def mean_over(logits, labels, stride, of):
        return losses.loss_and_accuracy(
            logits,
            labels,
            chosen,
            grid=model.resize_grid,
            stride=stride,
            rounded=model.dtype,
            shards=config.mesh.space,
            of=of,
        )

    def loss_fn(params, batch_stats, network, batch, key, of=None):
        output: Any = network.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            coarse=True,
            valid=batch.get("valid"),
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
        )
        logits, updated = output
        with jax.named_scope("loss"):
            loss, accuracy = mean_over(logits, batch["label"], model.logit_stride, of)
            for aux_logits in updated.get("intermediates", {}).get("aux_logits", ()):
                auxiliary, _ = mean_over(aux_logits, batch["label"], model.aux_stride, of)
                loss += config.loss.aux_weight * auxiliary
        return loss, (updated["batch_stats"], accuracy)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(state, batch, key):
        once = model.clone(bn_momentum=0.0)  # whose new statistics are the part's own

        def of_part(part, key):
            (loss, (batch_stats, accuracy)), grads = gradient(
                state.params, state.batch_stats, once, part, key, of=batch["label"]
            )
            return (loss, accuracy, grads), batch_stats

        (loss, accuracy, grads), found = accumulation.summed(of_part, batch, key, parts)
        batch_stats = state.batch_stats
        if not model.bn_frozen:
            batch_stats = accumulation.merged_statistics(batch_stats, found, model.bn_momentum)
        if model.backbone_frozen:
            batch_stats |= {"backbone": state.batch_stats["backbone"]}
        return (loss, (batch_stats, accuracy)), grads

    def train_step(state: TrainState, batch: Batch, seed: jax.Array | np.uint32):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if parts > 1:
            (loss, (batch_stats, accuracy)), grads = accumulated(state, batch, key)
        else:
            (loss, (batch_stats, accuracy)), grads = gradient(
                state.params, state.batch_stats, model, batch, key
            )
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, finite=finite
            )
            params: Any = optax.apply_updates(state.params, updates)
            if model.backbone_frozen:  # weight decay would move it
                params |= {"backbone": state.params["backbone"]}
            ema = state.ema
            if config.optimizer.ema_decay:
                new = {"params": params, "batch_stats": batch_stats}
                ema = optax.incremental_update(new, ema, 1 - config.optimizer.ema_decay)
            # The optimizer does the same with its own state.
            step, params, batch_stats, ema = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (state.step + 1, params, batch_stats, ema),
                (state.step, state.params, state.batch_stats, state.ema),
            )
        metrics = {"loss": loss, "grad_norm": norm, "PA": accuracy}
        if "bad" in batch:
            metrics["bad_share"] = batch["bad"].mean(dtype=jnp.float32)
        return TrainState(step, params, batch_stats, opt_state, ema), metrics

    return train_step
