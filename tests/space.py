"""One training run with the rows of its images split over devices against one on a single device.

    JAX_NUM_CPU_DEVICES=8 python tests/space.py --config=configs/demo.py --config.mesh.space=4

Prints JSON: the largest difference of any array of the train state after two steps on one random
batch, relative to that array's largest value; the loss; seconds a step; what the program sends
between devices.
"""

from __future__ import annotations

import json
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, collectives, optimizer, sharding
from duc_dlc_jax.benchmark.model import random_batch
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train_step import create_state, init_variables, make_train_step
from networks import QUICK

CLASSES, STEPS = 5, 2


def train(config, mesh, batch, parts):
    """(state on the host, figures) after two steps on the mesh, BN in `parts` parts."""
    model = segmenter.create(config.model, CLASSES, parts)
    rule = optimizer.create(config.optimizer, 10)
    state = create_state(model, rule, config, init_variables(model, config.seed))
    state = jax.device_put(state, sharding.replicated(mesh))
    placed = sharding.to_devices(batch, mesh)
    step = sharding.jit_train_step(make_train_step(model, rule, config), mesh)
    compiled = step.lower(state, placed, config.seed).compile(QUICK)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, placed, config.seed)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    figures = {
        "loss": float(metrics["loss"]),
        "seconds_a_step": min(seconds),
        "temporaries_bytes": memory.temp_size_in_bytes,
    }
    return jax.device_get(state), figures, compiled.as_text()


def main(_):
    config = flags.FLAGS.config
    segmenter.enable_dtype(config.model)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
    batch = random_batch(config, CLASSES)
    parts = flags.FLAGS.bn_parts or sharding.bn_groups(config, mesh)
    split, figures, text = train(config, mesh, batch, parts)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    whole, alone, _ = train(config, one, batch, parts)

    leaves = jax.tree_util.tree_leaves_with_path(whole)
    differences = {
        jax.tree_util.keystr(path): float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
        for (path, a), b in zip(leaves, jax.tree.leaves(split), strict=True)
        if a.size
    }
    worst = max(differences, key=lambda name: differences[name])
    found = collectives.collectives(text)
    print(
        json.dumps(
            {
                "mesh": dict(mesh.shape),
                "difference": differences[worst],
                "of": worst,
                "split": figures,
                "one_device": alone,
                "collectives": collectives.totals(found),
                "largest": {
                    kind: max((c.elements, c.source) for c in found if c.kind == kind)
                    for kind in collectives.totals(found)
                },
                "groups": sorted({(c.source, c.group) for c in found if c.kind == "all-reduce"}),
            }
        )
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration.")
    flags.DEFINE_integer("bn_parts", 0, "Parts for batch norm; 0 = as model.bn_groups says.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
