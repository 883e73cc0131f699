"""From two folders to a trained model: `python -m duc_dlc_jax.fit --images=DIR --labels=DIR \
--workdir=DIR [--classes=FILE] [--weights=FILE --source=NAME] [--steps=N] [--config.a.b=VALUE]`.

Looks at the folders (`data/folders.py`), plans (`plans.py`), shows the plan and asks once on a
terminal; then writes WORKDIR/config.py, prepares the records in WORKDIR/data, trains and evaluates
as `duc_dlc_jax.main` does. The same command on the same workdir keeps the plan and resumes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from duc_dlc_jax import cli, plans, storage
from duc_dlc_jax import config as config_lib
from duc_dlc_jax.data import builders, classes, folders, labels, prepare
from duc_dlc_jax.data.builders.files import walk
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.train import train

PLAN_FILE, RECORD_FILE = "config.py", "fit.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags of the command; `fields` are the configuration fields that were given."""

    images: str
    labels: str
    classes: str | None
    name: str  # "": that of the workdir
    val_share: float
    seed: int
    binary: bool
    skip_bad: bool
    fields: dict[str, Any]

    def inspect(self, workdir: Path) -> folders.Inspection:
        """Reads the folders; the data set is named after the workdir unless it was given a name."""
        return folders.inspect(
            self.images,
            self.labels,
            self.classes,
            self.seed,
            name=safe_name(self.name or workdir.resolve().name),
            val_share=self.val_share,
            binary=self.binary,
            skip_bad=self.skip_bad,
        )

    def record(self) -> dict[str, Any]:
        """Returns what a later call compares itself with: flags, classes, and the files by size.

        No classes where the folder of masks is gone, unless they are given.
        """
        chosen = dataclasses.asdict(self) | {"fields": dict(sorted(self.fields.items()))}
        for name in ("images", "labels", "classes"):
            del chosen[name]  # the files may move; their content counts
        roots = [("images", Path(self.images)), ("labels", Path(self.labels))]
        files = {
            f"{kind}/{name}": path.stat().st_size
            for kind, root in roots
            for name, path in walk(root).items()
            if path.is_file()
        }
        record: dict[str, Any] = {"flags": chosen, "files": files}
        path = folders.find_classes(Path(self.labels), self.classes)
        if path or Path(self.labels).is_dir():
            entries = classes.read_classes(path) if path else []
            record["classes"] = [
                {
                    key: value
                    for key, value in dataclasses.asdict(entry).items()
                    if value is not None
                }
                for entry in entries
            ]
        return json.loads(json.dumps(record))


def fit(request: Request, workdir: Path, *, yes: bool = False, command: str = "") -> dict | None:
    """Plans unless `workdir` has a plan, prepares unless that is done, trains and evaluates.

    Args:
      request: what to train on and how.
      workdir: receives config.py, fit.json, data/ and all that training writes.
      yes: do not ask, also on a terminal.
      command: the command line, for the docstring of config.py.

    Returns:
      The scores of the last evaluation; None where the question was answered with no.

    Raises:
      ConfigError, DataError, FileNotFoundError: as `folders.inspect`, `plans.make` and `train`
        do; the workdir belongs to another run or was planned with other flags.
    """
    path, found = workdir / PLAN_FILE, None
    if path.is_file():
        _check_record(workdir, request)
        print(f"{path} is kept: this goes on with the plan of an earlier call", flush=True)
        cli.use_deterministic_kernels(config_lib.load(str(path)).train.deterministic)
    else:
        if (workdir / "config.json").exists():
            raise config_lib.ConfigError(
                f"--workdir={workdir} holds a run that fit did not plan; give another folder"
            )
        found = request.inspect(workdir)
        cli.use_deterministic_kernels(request.fields.get("train.deterministic", False))
        plan, seconds = make_plan(found, request)
        print(text(found, plan, seconds), flush=True)
        if not (yes or _confirmed()):
            return None
        notes = [f"Planned   {command}", f"Hardware  {plan.machine}", _time(plan, seconds)]
        _write(workdir, request, plan, [*notes, "", *found.lines()])
    config = config_lib.load(str(path))
    if not prepare.is_prepared(builders.prepared_dir(config.data.dir, config.data.name)):
        found = found or request.inspect(workdir)
        prepare.prepare_folders(found, config.data.dir)
    segmenter.enable_dtype(config.model)
    return train(config, workdir)


def make_plan(found: folders.Inspection, request: Request) -> tuple[plans.Plan, float | None]:
    """Returns a plan and the seconds of a step, where `plans.step_seconds` measures it.

    Raises:
      ConfigError: as `plans.make` does; no batch fits the memory.
    """
    machine, most = plans.Machine.here(), plans.MOST_BATCH
    while True:
        plan = plans.make(found, machine, request.fields, most)
        try:
            return plan, plans.step_seconds(plan)
        except MemoryError as error:
            batch = plan.config.train.batch_size
            if batch == machine.devices or "train.batch_size" in request.fields:
                smaller = max(32, plan.config.data.crop_size // 64 * 32)
                raise config_lib.ConfigError(
                    f"{error} on {machine}; try a smaller batch, or crops of "
                    f"--config.data.crop_size={smaller}"
                ) from error
            most = batch // 2


def text(found: folders.Inspection, plan: plans.Plan, seconds: float | None) -> str:
    """Returns for people what was found and what is planned."""
    rows = [*found.lines(), "", f"Hardware  {plan.machine}", *plan.lines(), _time(plan, seconds)]
    return "\n".join(rows)


def _time(plan: plans.Plan, seconds: float | None) -> str:
    return f"Time      {plans.expected(plan, seconds)}"


def _main_command(workdir: Path) -> str:
    plan, run = (shlex.quote(str(path)) for path in (workdir / PLAN_FILE, workdir))
    return f"python -m duc_dlc_jax.main --config={plan} --workdir={run}"


def _write(workdir: Path, request: Request, plan: plans.Plan, notes: list[str]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    notes = [
        f"{plan.config.data.name}: two folders of one's own.",
        "",
        f"Command   {_main_command(workdir)}",
        *notes,
    ]
    (workdir / RECORD_FILE).write_text(json.dumps(request.record(), indent=1) + "\n")
    text = plans.source_text(plan, "\n".join(notes))
    storage.write_whole(workdir / PLAN_FILE, text)  # last: with it the plan is complete


def _check_record(workdir: Path, request: Request) -> None:
    """Raises ConfigError for flags or classes other than the plan's; says which files changed."""
    path = workdir / RECORD_FILE
    if not path.is_file():
        raise config_lib.ConfigError(
            f"{workdir / PLAN_FILE} was not written by fit: {path} is missing; train with "
            + _main_command(workdir)
        )
    old, new = json.loads(path.read_text()), request.record()
    changed = [name for name in new["flags"] if new["flags"][name] != old["flags"].get(name)]
    if changed:
        differ = "; ".join(
            f"{name}: {old['flags'].get(name)!r}, now {new['flags'][name]!r}" for name in changed
        )
        raise config_lib.ConfigError(
            f"{workdir} was planned with other flags ({differ}). Edit {workdir / PLAN_FILE} and "
            "repeat the first command, or give another --workdir"
        )
    if "classes" in old and new.get("classes", old["classes"]) != old["classes"]:
        raise config_lib.ConfigError(
            f"{workdir} was planned with other classes; {path} has them. Give the file of classes "
            "as it was, or another --workdir"
        )
    before, now = old["files"], new["files"]
    moved = [
        (kind, sorted(names))
        for kind, names in (
            ("new", set(now) - set(before)),
            ("gone", set(before) - set(now)),
            ("of another size", {n for n in set(now) & set(before) if now[n] != before[n]}),
        )
        if names
    ]
    if moved:
        listed = ", ".join(f"{len(names)} {kind} (first {names[0]})" for kind, names in moved)
        absl_logging.warning(
            "the folders changed since they were looked at: %s. Records that are prepared stay as "
            "they are; to train on what is there now give another --workdir",
            listed,
        )


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        return True
    return input("Prepare and train? [Y/n] ").strip().lower() in ("", "y", "yes")


def safe_name(text: str) -> str:
    """Returns a name for a data set: lower case, digits and "_", no known data set's."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "images"
    return f"own_{name}" if labels.is_known(name) or not name[0].isalpha() else name


def _request(args: Any) -> Request:
    fields = dict(config_flags.get_override_values(args["config"]))
    direct = {"init.weights": args.weights, "init.source": args.source, "train.steps": args.steps}
    fields |= {name: value for name, value in direct.items() if value}
    if args.seed:
        fields["seed"] = args.seed
    return Request(
        images=args.images,
        labels=args.labels,
        classes=args.classes,
        name=args.name,
        val_share=args.val_share,
        seed=args.seed,
        binary=args.binary,
        skip_bad=args.skip_bad,
        fields=fields,
    )


def main(argv: list[str]) -> None:
    args = flags.FLAGS
    workdir = Path(storage.local("--workdir", args.workdir))
    request = _request(args)
    if args.plan_only:
        found = request.inspect(workdir)
        print(text(found, *make_plan(found, request)))
        return
    storage.check(workdir, write=True, flag="--workdir")
    cli.use_compilation_cache(epath.Path(workdir))
    command = shlex.join(["python", "-m", "duc_dlc_jax.fit", *sys.argv[1:]])
    if fit(request, workdir, yes=args.yes, command=command) is None:
        print("nothing was written")


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images, PNG or JPEG.", required=True)
    flags.DEFINE_string("labels", None, "Folder of their masks, PNG.", required=True)
    flags.DEFINE_string("workdir", None, "Plan, records and all of the run go here.", required=True)
    flags.DEFINE_string("classes", None, "File of classes, JSON or .txt; see docs/own_images.md.")
    flags.DEFINE_string("weights", "", "Backbone weights: a name or a file; docs/conversion.md.")
    flags.DEFINE_string("source", "", "Where the weights are from; docs/conversion.md.")
    flags.DEFINE_string("name", "", "Of the data set; by default that of the workdir.")
    flags.DEFINE_float("val_share", 0.15, "Of the images, for evaluation.", 0.0, 1.0)
    flags.DEFINE_integer("seed", 0, "Of the split and the training.", lower_bound=0)
    flags.DEFINE_integer("steps", 0, "Training steps; 0: planned.", lower_bound=0)
    flags.DEFINE_bool("yes", False, "Do not ask before preparing and training.")
    flags.DEFINE_bool("binary", False, "The masks are 0 for background and 255 for one class.")
    flags.DEFINE_bool("skip_bad", False, "Leave out files that cannot be used, and name them.")
    flags.DEFINE_bool("plan_only", False, "Show the plan and write nothing.")
    cli.define_fields("Fields that are then not planned: --config.train.batch_size=8.")
    cli.run(main)
