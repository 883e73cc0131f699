"""Means, spreads, and paired differences of runs that share their seeds, and so their crops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of `values`, one per seed, with the half width of its 95% confidence interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def half_width(self) -> float:
        """By Student's t over the seeds; infinite for fewer than two."""
        return half_width(self.values)

    @property
    def p(self) -> float:
        """Two-sided p-value of the paired t-test; 1 for fewer than two seeds."""
        spread = np.std(self.values, ddof=1) if len(self.values) > 1 else 0.0
        if len(self.values) < 2 or spread == 0:
            return 1.0 if len(self.values) < 2 or self.mean == 0 else 0.0
        t = self.mean / (spread / math.sqrt(len(self.values)))
        return float(2 * stats.t.sf(abs(t), len(self.values) - 1))


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% confidence interval of the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """second - first over the seeds that both have; first, second: seed -> score."""
    seeds = sorted(first.keys() & second.keys())
    return Difference(tuple(second[seed] - first[seed] for seed in seeds))


def verdicts(differences: Sequence[Difference], level: float = 0.05) -> list[str]:
    """ "higher", "lower", "not told apart" or "too few seeds", for each of a family of questions.

    Holm's correction: of m questions asked at once, some would pass at 5% by chance; with it the
    chance that any verdict of the family is wrong stays below 5%.
    """
    told = ["not told apart" if len(d.values) > 1 else "too few seeds" for d in differences]
    asked = [i for i, d in enumerate(differences) if len(d.values) > 1]
    for rank, i in enumerate(sorted(asked, key=lambda i: differences[i].p)):
        if differences[i].p > level / (len(asked) - rank):
            break
        told[i] = "higher" if differences[i].mean > 0 else "lower"
    return told
