"""Which runs a grid has: variants of one configuration, each with its seeds, in a stated order."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.config import ConfigError

Changes = Mapping[str, Any]  # field of the configuration -> value


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, what it changes in the configuration, and how many seeds it wants, from 0 on."""

    name: str
    changes: Changes
    seeds: int = 3
    note: str = ""

    def config(self, base: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
        """The configuration of one run; raises ConfigError where it cannot run."""
        config = base.copy_and_resolve_references()
        for field in self.changes:
            config_lib.check_field_name(field)
        config.update_from_flattened_dict(dict(self.changes) | {"seed": seed})
        config_lib.validate(config)
        return config


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a variant."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-seed{self.seed}"


def parts(upsampling: str, context: str, **model: Any) -> dict[str, Any]:
    """Changes of `config.model`: parts("duc", "none", output_stride=16)."""
    model = {"upsampling": upsampling, "context": context} | model
    return {f"model.{name}": value for name, value in model.items()}


Question = tuple[str, str, str]  # first, second, in words: answered by second - first
# Of a recipe, what says how long and on how much a network is trained.
BUDGET = ("train.epochs", "train.steps", "train.batch_size", "data.crop_size")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Variants in the order in which they run, and the questions that their runs answer.

    comparisons: questions by family, the main one first; verdicts are corrected within each.
    title: the protocol in words. recipe: the fields of `BUDGET` as the configuration file has them.
    """

    variants: tuple[Variant, ...]
    comparisons: Mapping[str, tuple[Question, ...]] = dataclasses.field(default_factory=dict)
    title: str = ""
    recipe: Changes = dataclasses.field(default_factory=dict)

    def check(self, names: Iterable[str]) -> None:
        """names: of the variants that have runs; raises ConfigError for one that is not its own."""
        if strange := sorted(set(names) - {variant.name for variant in self.variants}):
            raise ConfigError(
                f"there are runs of variants that the grid lacks: {', '.join(strange)}; each grid "
                "has a --workdir of its own"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Grid:
        fields = json.loads(text)
        variants = tuple(Variant(**variant) for variant in fields["variants"])
        comparisons = _families(fields["comparisons"])
        return cls(variants, comparisons, fields.get("title", ""), fields.get("recipe", {}))


def _families(comparisons: Mapping[str, Sequence] | Sequence) -> dict[str, tuple[Question, ...]]:
    """Questions by family; a mere list of them is one family without a name."""
    named = comparisons if isinstance(comparisons, Mapping) else {"": comparisons}
    return {name: tuple((a, b, c) for a, b, c in rows) for name, rows in named.items()}


def load(path: str) -> Grid:
    """What `get_variants`, `get_comparisons` and `get_title` of a configuration file return.

    Without the second every variant is compared with the first one. Raises ConfigError for an error
    in the file, and where it has no variants, two of one name, or a question about others.
    """
    path, argument = config_lib.split_argument(config_lib.find(path))
    with config_lib.errors_of(path):
        return _grid(path, runpy.run_path(path), *argument)


def _grid(path: str, functions: dict[str, Any], *argument: str) -> Grid:
    """Of what a configuration file defines."""
    if "get_variants" not in functions:
        raise ConfigError(
            f"{path} has no get_variants(), the list of ablate.grid.Variant to train; see "
            "configs/ablation_camvid.py"
        )
    variants = tuple(functions["get_variants"]())
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: several variants are called {', '.join(twice)}")
    if "get_comparisons" in functions:
        comparisons = _families(functions["get_comparisons"]())
    else:
        comparisons = _families(
            [(names[0], v.name, v.note or text_of(v.changes)) for v in variants[1:]]
        )
    asked = [name for rows in comparisons.values() for row in rows for name in row[:2]]
    for name in asked:
        if name not in names:
            raise ConfigError(
                f"{path}: get_comparisons() names {name!r}; there are {', '.join(names)}"
            )
    title = functions["get_title"]() if "get_title" in functions else ""
    fields = dict(config_lib.fields(functions["get_config"](*argument)))
    return Grid(variants, comparisons, title, {name: fields[name] for name in BUDGET})


def text_of(changes: Changes) -> str:
    """The changes in one line."""
    return " ".join(f"{name}={value}" for name, value in changes.items())


def runs(
    listed: Sequence[Variant], only: str = "", seeds: Sequence[int] | None = None
) -> list[Run]:
    """The runs in order: variant by variant, so that the seeds of one share its program.

    only: patterns of names, "duc*,fcn"; seeds: in place of each variant's own.
    Raises ConfigError for a pattern that no variant has.
    """
    patterns = [pattern for pattern in only.split(",") if pattern]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(variant.name, pattern) for variant in listed):
            names = ", ".join(variant.name for variant in listed)
            raise ConfigError(f"--only={pattern} names no variant; there are {names}")
    return [
        Run(variant, seed)
        for variant in listed
        if not patterns or any(fnmatch.fnmatchcase(variant.name, p) for p in patterns)
        for seed in (range(variant.seeds) if seeds is None else seeds)
    ]
