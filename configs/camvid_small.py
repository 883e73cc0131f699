"""CamVid at a crop of 240 and 2,720 images: a real run that a CPU finishes within an hour."""

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
