"""Cityscapes, 19 classes: train 2,975 and val 500 images of 1024x2048.

Command   python -m duc_dlc_jax.main --config=configs/cityscapes.py --workdir=runs/cityscapes
          --config.init.weights=resnet101
Data      python -m duc_dlc_jax.data.prepare --dataset=cityscapes --raw_dir=DIR --data_dir=data
Hardware  8 accelerators with 40 GB or more; not run by us; predicted hours: docs/results/paper.md
Score     the paper's, of the test server, in docs/results/paper.md; not measured here
"""

from duc_dlc_jax import config as base


def get_config():
    config = base.default()
    config.data.name = "cityscapes"
    config.data.base_size = 1024
    config.data.crop_size = 768
    config.data.antialias = True  # as the code base's Pillow shrinks
    config.data.workers = 8
    config.model.depth = 101
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-2  # the code's table; the paper names 1e-3 for all sets
    config.train.epochs = 240.0  # 2,975 x 240 / 16 = 44,625 steps
    config.train.eval_every = 4000
    return config
