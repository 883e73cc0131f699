"""The trainings behind the paper's tables, one by its name after the colon.

Command   python -m duc_dlc_jax.main --config=configs/paper.py:ade20k_r50 --workdir=runs/paper_r50
          ade20k_r50 ade20k_r101 ade20k_r152 ade20k_r269 pascal_context_r101 cityscapes_r101
          another file of weights: --config.init.weights=FILE --config.init.source=NAME
Data      as configs/ade20k.py, configs/pascal_context.py, configs/cityscapes.py say
Hardware  8 accelerators with 40 GB or more; hours by device: docs/results/paper.md
Score     the paper's, in docs/results/paper.md; not measured here
"""

from duc_dlc_jax import config as base

RUNS = {
    "ade20k_r50": ("configs/ade20k.py", 50),
    "ade20k_r101": ("configs/ade20k.py", 101),
    "ade20k_r152": ("configs/ade20k.py", 152),
    "ade20k_r269": ("configs/ade20k.py", 269),
    "pascal_context_r101": ("configs/pascal_context.py", 101),  # the paper names no depth
    "cityscapes_r101": ("configs/cityscapes.py", 101),  # nor here
}
WEIGHTS = {50: "resnet50", 101: "resnet101", 152: "resnet152"}  # of 269 layers: a file of your own


def get_config(run="ade20k_r50"):
    if run not in RUNS:
        raise base.ConfigError(f"configs/paper.py:{run}; allowed: {', '.join(RUNS)}")
    path, depth = RUNS[run]
    config = base.load(path)
    config.model.depth = depth
    config.init.weights = WEIGHTS.get(depth, "")
    config.optimizer.learning_rate = 1e-3  # the paper's for all three sets
    return config
