"""The drawn scenes of configs/demo.py: FCN, DeepLabv3 and DUC + DLC, each with its budget.

Command   python -m duc_dlc_jax.ablate --config=configs/ablation_demo.py --workdir=runs/scenes
Data      python -m duc_dlc_jax.data.prepare --dataset=scenes --data_dir=data
Hardware  2 CPU cores
Score     docs/results/scenes.md
"""

from duc_dlc_jax import config as base
from duc_dlc_jax.ablate.grid import Variant, parts


def get_config():
    config = base.load("configs/demo.py")
    config.train.eval_every = 0
    return config


def get_variants():
    aspp = parts("none", "aspp", output_stride=16, context_width=64)  # as wide as the demo's DLC
    return [
        Variant("fcn", parts("none", "none"), 5, "classifier on layer4"),
        Variant("deeplabv3", aspp, 5, "at 1/16"),
        Variant("duc_dlc", parts("duc", "dlc"), 5, "the paper's network"),
        Variant("bilinear_dlc", parts("bilinear", "dlc"), 5, "without the guidance"),
    ]


def get_title():
    return "Drawn scenes, a small network from scratch, 340 steps"


def get_comparisons():
    return [
        ("fcn", "duc_dlc", "the paper's network against FCN"),
        ("deeplabv3", "duc_dlc", "the paper's network against DeepLabv3 at 1/16"),
        ("bilinear_dlc", "duc_dlc", "DUC's guidance, under DLC"),
    ]
