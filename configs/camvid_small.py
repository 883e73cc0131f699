"""CamVid at a crop of 240 and 2,720 images (340 steps of 8): a real run for a CPU.

Command   python -m duc_dlc_jax.main --config=configs/camvid_small.py --workdir=runs/camvid_small
          --config.init.weights=FILE
          FILE: an ImageNet ResNet-50 with the stride on its 1x1 convolutions (source keras_v1)
Hardware  2 CPU cores, 20 minutes
Score     0.595 val mIoU, 0.906 PA (seed 0, the command above); docs/results/camvid.md
"""

from duc_dlc_jax import config as base


def get_config():
    config = base.load("configs/camvid.py")
    config.data.crop_size = 240
    config.data.scale_max = 1.5
    config.model.stride_on = "1x1"
    config.init.source = "keras_v1"
    config.train.batch_size = 8
    config.train.steps = 340
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.checkpoint_every = 50
    return config
