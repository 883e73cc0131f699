"""CamVid, 11 classes, 480x360: train 367 and val 101 images.

Command   python -m duc_dlc_jax.main --config=configs/camvid.py --workdir=runs/camvid
          --config.init.weights=FILE --config.init.source=NAME
Data      python -m duc_dlc_jax.data.prepare --dataset=camvid --raw_dir=DIR --data_dir=data
Hardware  one accelerator with 16 GB or more; an H200 took 2.5 minutes for the run below
Score     not measured with this command. 0.718 val mIoU, 0.941 PA, and 0.742 with six scales and
          flips, by this recipe in configs/ablation_camvid.py: bfloat16, ImageNet weights of source
          keras_v1, stride_on=1x1, the last step (docs/results/camvid.md has its command)
"""

from duc_dlc_jax import config as base


def get_config():
    config = base.default()
    config.data.name = "camvid"
    config.data.base_size = 360
    config.data.crop_size = 360
    config.data.antialias = True  # as the code base's Pillow shrinks
    config.data.in_memory = True
    config.optimizer.learning_rate = 2e-3
    config.train.epochs = 200.0  # 367 x 200 / 16 = 4,588 steps
    config.train.eval_every = 500
    return config
