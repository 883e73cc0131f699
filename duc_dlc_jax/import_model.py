"""A segmenter that others trained, as a workdir: `python -m duc_dlc_jax.import_model \
--weights=deeplabv3_resnet50 --workdir=DIR [--labels=NAME_OR_FILE]`.

`predict`, `evaluate` and `main` take the workdir as if it had been trained here. --weights is a
name of docs/conversion.md or the file of a state dict; its classes are those of --labels.
"""

from __future__ import annotations

import math
import shlex

import jax
import ml_collections
from absl import flags, logging
from etils import epath

from duc_dlc_jax import cli, storage, workdirs
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.data import labels as labels_lib
from duc_dlc_jax.models import deeplabv3, segmenter, weights
from duc_dlc_jax.models.tensor_files import read_tensors
from duc_dlc_jax.train_step import first_state


def import_model(name: str, workdir: epath.Path, labels: str = "") -> ml_collections.ConfigDict:
    """Writes the workdir of a segmenter; returns its configuration.

    Args:
      name: of `weights.TABLE`, or a file of torchvision's DeepLabv3.
      workdir: receives config.json, labels.json and a checkpoint of step 0.
      labels: name of a label specification or a labels.json; "": that of the name.

    Raises:
      ConfigError: no such name, or not a file that can be imported; another number of classes than
        the labels'; the workdir holds a run.
      FileNotFoundError: no such file.
    """
    workdirs.check_new(workdir, "--workdir")
    path, source = weights.find(name, what="--weights")
    tensors = read_tensors(path, what="--weights")
    layout = deeplabv3.recognised(path, tensors)
    classes = deeplabv3.num_classes(tensors, layout)
    spec = _spec(name, labels, classes)
    config = config_lib.default()
    config.model.update(deeplabv3.model_fields(tensors, layout))
    config.init.update({"weights": name, "source": source})  # "" for a file: nobody declared it
    config.data.name = spec.name
    config_lib.validate(config)
    model = segmenter.create(config.model, classes)
    variables = deeplabv3.load(path, tensors, layout, segmenter.variable_shapes(model))
    workdirs.create(workdir, config, spec, first_state(model, config, variables))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    logging.info("%s: %s parameters, names like %s", path, f"{count:,}", layout.name)
    return config


def _spec(name: str, labels: str, classes: int) -> labels_lib.LabelSpec:
    known = weights.TABLE.get(name)
    labels = labels or (known.classes if known else "")
    if not labels:
        raise config_lib.ConfigError(
            f"{name} has {classes} classes and does not name them: give --labels, the name of a "
            "data set or a labels.json"
        )
    spec = labels_lib.named_or_read(labels)
    if spec.num_classes != classes:
        raise config_lib.ConfigError(
            f"--labels={labels} has {spec.num_classes} classes, the network of {name} {classes}"
        )
    return spec


def main(_) -> None:
    args = flags.FLAGS
    workdir = storage.path(args.workdir)
    config = import_model(args.weights, workdir, args.labels)
    known = weights.TABLE.get(args.weights)
    if known:
        print(f"weights    {known.owner}, {known.licence}, trained on {known.data}")
    print(f"classes    {config.data.name}")
    print(
        f"predict    python -m duc_dlc_jax.predict --model={shlex.quote(str(workdir))} "
        "--input=IMAGE_OR_FOLDER --output=predictions"
    )


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "A name or a file, docs/conversion.md.", required=True)
    flags.DEFINE_string("workdir", None, "A new folder for the model.", required=True)
    flags.DEFINE_string("labels", "", "A data set's name or a labels.json; default: the name's.")
    cli.run(main)
