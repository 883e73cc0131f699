"""CamVid, the reduced protocol: the first six of configs/ablation_camvid.py at a CPU's budget.

Reduced: crops of 240 in place of 360, 340 steps of 8 (2,720 images) in place of 200 epochs, 3 seeds
each. The recipe is that of configs/camvid_small.py, with ImageNet weights. One learning rate serves
all variants, set for the paper's network before any run; 340 steps are few for DeepLabv3's ASPP, 16
of 40 million parameters that start from scratch.

Command   nohup nice -n 19 python -m duc_dlc_jax.ablate --config=configs/ablation_camvid_small.py
          --workdir=runs/small --config.init.weights=FILE >> runs/small.log 2>&1 &
          FILE: an ImageNet ResNet-50 with the stride on its 1x1 convolutions (source keras_v1)
          Killed at any time, the same command goes on: at most 50 steps are done again
Data      python -m duc_dlc_jax.data.prepare --dataset=camvid --raw_dir=DIR --data_dir=data
Hardware  one CPU core a process: 14 (FCN) to 25 minutes a run, 32 for DeepLabv3
Score     docs/results/ablation_small.md
"""

import dataclasses

from duc_dlc_jax import config as base
from duc_dlc_jax.ablate import grid

FULL = "configs/ablation_camvid.py"


def get_config():
    config = base.load("configs/camvid_small.py")
    config.train.eval_every = 0  # an evaluation takes as long as 25 steps
    return config


def get_variants():
    return [dataclasses.replace(v, seeds=3) for v in grid.load(FULL).variants[:6]]


def get_title():
    return "Reduced protocol: crops of 240, 340 steps, on one CPU core"


def get_comparisons():
    """Those families of the full grid whose variants are all here."""
    names = {variant.name for variant in get_variants()}
    families = grid.load(FULL).comparisons
    return {f: rows for f, rows in families.items() if {n for r in rows for n in r[:2]} <= names}
