"""CamVid, 11 classes, 480x360: train 367 images, val 101."""

from duc_dlc_jax import config as base


def get_config():
    config = base.default()
    config.data.name = "camvid"
    config.data.base_size = 360
    config.data.crop_size = 360
    config.data.in_memory = True
    config.optimizer.learning_rate = 2e-3
    config.train.epochs = 200.0
    config.train.eval_every = 500
    return config
