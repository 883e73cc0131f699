"""Trains: `python -m duc_dlc_jax.main --config=configs/camvid.py --workdir=runs/camvid`.

Any field can be changed on the command line: `--config.train.batch_size=8`. The same command on the
same workdir resumes.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, distributed, storage, verify_resume
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, figures, pictures; may be s3:// or gs://."
)
_VERIFY = flags.DEFINE_bool(
    "verify_resume",
    False,
    "Check that a killed and resumed run equals a straight one, bit for bit.",
)
_VERIFY_STEPS = flags.DEFINE_integer("verify_steps", 10, "Steps of --verify_resume.")
_RECORDS = flags.DEFINE_bool("record_names", False, "Write each step's records to records.jsonl.")
distributed.define_flags()


def main(_) -> None:
    if _VERIFY.value:
        workdir = storage.path(_WORKDIR.value or "")
        print(verify_resume.verify(sys.argv[1:], workdir, _VERIFY_STEPS.value))
        return
    cli.use_deterministic_kernels(_CONFIG.value.train.deterministic)
    distributed.start(flags.FLAGS)
    workdir = storage.path(_WORKDIR.value or "")
    cli.use_compilation_cache(workdir)
    segmenter.enable_dtype(_CONFIG.value.model)
    train(_CONFIG.value, workdir, _RECORDS.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
