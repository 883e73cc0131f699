"""`python -m duc_dlc_jax.describe --config=configs/X.py [--json]`: the network in numbers.

Everything is computed from shapes; nothing is compiled and no data set is needed. With
`--devices=64` or `--topology=v5e:4x4` the training step is compiled for these devices, which need
not be there: `forecast`. `--hours` says how long the training takes by steps that were timed.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from duc_dlc_jax import cli, forecast, hours
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import counts, segmenter
from duc_dlc_jax.train_step import state_bytes


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The figures of `models.counts` for `config`, at its crop size and its data set's classes."""
    config_lib.validate(config)
    spec, size = find_spec(config.data), config_lib.crop_shape(config.data)
    model = segmenter.create(config.model, spec.num_classes)
    figures = {
        "data set": spec.name,
        "classes": spec.num_classes,
        "parameters": counts.parameters(model),
        "image": list(size),
        "macs": counts.macs(model, *size),
        "grids": counts.grids(*size, config.model.output_stride, config.model.upsampling),
        "train_state_bytes": state_bytes(model, config),
    }
    if config.model.context == "dlc":
        figures["receptive_field_dlc"] = counts.receptive_field(config.model.dlc_rates)
    return figures


def text(d: dict[str, Any]) -> str:
    """The figures as aligned lines."""
    size = "x".join(map(str, d["image"]))
    rows = [f"{d['data set']}, {d['classes']} classes; multiply-adds for one {size} image"]
    rows.append(f"{'part':<16}{'parameters':>14}{'GMACs':>10}")
    for part, count in d["parameters"].items():
        rows.append(f"{part:<16}{count:>14,}{d['macs'].get(part, 0) / 1e9:>10.2f}")
    total = sum(d["macs"].values()) / 1e9
    rows.append(f"{'total':<16}{sum(d['parameters'].values()):>14,}{total:>10.2f}")
    rows += [f"grid of {name}: {h} x {w}" for name, (h, w) in d["grids"].items()]
    if "receptive_field_dlc" in d:
        fields, grid = " -> ".join(map(str, d["receptive_field_dlc"])), list(d["grids"])[-1]
        rows.append(f"receptive field of DLC's cascade: {fields} cells of the grid of {grid}")
    rows.append(f"train state: {d['train_state_bytes'] / 2**20:.0f} MiB")
    return "\n".join(rows)


def main(_) -> None:
    args = flags.FLAGS
    config_lib.validate(args.config)
    if bool(args.devices) + bool(args.topology) + args.hours > 1:
        raise config_lib.ConfigError("of --devices, --topology and --hours one at a time")
    if args.devices:
        what = f"{args.devices} devices"
        make = functools.partial(forecast.on_cpu_devices, args.config, args.devices)
    elif args.topology:
        what = args.topology + " with full effort" * args.full_effort
        make = functools.partial(forecast.on_topology, args.config, args.topology, args.full_effort)
    else:
        figures = hours.predict(args.config) if args.hours else describe(args.config)
        shown = hours.text if args.hours else text
        print(json.dumps(figures, indent=1) if args.json else shown(figures))
        return
    figures = forecast.cached(args.config, what, make)
    print(json.dumps(figures, indent=1) if args.json else forecast.text(figures))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration, see configs/.")
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_integer("devices", 0, "FLOPs and collectives on so many devices.", lower_bound=0)
    flags.DEFINE_string("topology", "", "Memory, time and efficiency on a TPU slice: v5e:4x4.")
    flags.DEFINE_bool("hours", False, "Hours of the training on devices whose step was timed.")
    flags.DEFINE_bool("full_effort", False, "Compile for --topology as for running: slow.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)
