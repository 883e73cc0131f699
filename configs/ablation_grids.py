"""CamVid, the run of configs/camvid_small.py: resize grids and shrinking over several seeds.

Command   python -m duc_dlc_jax.ablate --config=configs/ablation_grids.py --workdir=runs/grids
          --config.init.weights=FILE
Data      python -m duc_dlc_jax.data.prepare --dataset=camvid --raw_dir=DIR --data_dir=data
Hardware  one accelerator, or 2 CPU cores and 20 minutes a run
Score     docs/results/camvid.md
"""

from duc_dlc_jax import config as base
from duc_dlc_jax.ablate.grid import Variant


def get_config():
    config = base.load("configs/camvid_small.py")
    config.data.threads = 8
    config.data.prefetch = 8
    config.eval.batch_size = 4
    return config


def get_variants():
    return [
        Variant("corners", {}, 5),
        Variant("stride", {"model.resize_grid": "stride"}, 5),
        Variant("no_antialias", {"data.antialias": False}, 5),
    ]
