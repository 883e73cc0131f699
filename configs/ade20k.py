"""ADE20K (SceneParse150), 150 classes: train 20,210 and val 2,000 images.

Command   python -m duc_dlc_jax.main --config=configs/ade20k.py --workdir=runs/ade20k
          --config.init.weights=resnet50
Data      python -m duc_dlc_jax.data.prepare --dataset=ade20k --raw_dir=DIR --data_dir=data
Hardware  8 accelerators with 16 GB or more; not run by us; predicted hours: docs/results/paper.md
Score     the paper's in docs/results/paper.md; not measured here
"""

from duc_dlc_jax import config as base


def get_config():
    config = base.default()  # the paper's: 480 crops, base size 520, lr 1e-3, 120 epochs
    config.data.name = "ade20k"
    config.data.antialias = True  # as the code base's Pillow shrinks
    config.data.workers = 8
    config.model.dtype = "bfloat16"
    config.train.eval_every = 15000
    config.eval.pad_sides = (512, 704, 768, 1024, 1536, 2048)  # 11 programs: a side is <= 512
    return config
