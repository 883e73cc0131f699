"""PASCAL-Context, 59 classes (background ignored): train 4,998 and val 5,105 images.

Command   python -m duc_dlc_jax.main --config=configs/pascal_context.py --workdir=runs/pascal
          --config.init.weights=resnet50
          60 classes, background counted: --config.data.name=pascal_context_60
Data      python -m duc_dlc_jax.data.prepare --dataset=pascal_context --raw_dir=DIR --data_dir=data
Hardware  8 accelerators with 16 GB or more; not run by us; predicted hours: docs/results/paper.md
Score     the paper's in docs/results/paper.md; not measured here
"""

from duc_dlc_jax import config as base


def get_config():
    config = base.default()
    config.data.name = "pascal_context"
    config.data.antialias = True  # as the code base's Pillow shrinks
    config.data.workers = 8
    config.model.dtype = "bfloat16"
    config.train.epochs = 80.0
    config.train.eval_every = 5000
    config.eval.pad_sides = (384, 512)  # 4 programs: a side is <= 500
    return config
