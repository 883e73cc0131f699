"""Trains: `python -m duc_dlc_jax.main --config=configs/camvid.py --workdir=runs/camvid`.

Any field can be changed on the command line: `--config.train.batch_size=8`. The same command on the
same workdir resumes.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, figures and pictures go here.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, with several hosts.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", 0, "This process, from 0, with --coordinator.")


def main(_) -> None:
    if _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    workdir = Path(_WORKDIR.value or "")
    cli.use_compilation_cache(workdir)
    segmenter.enable_dtype(_CONFIG.value.model)
    train(_CONFIG.value, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
