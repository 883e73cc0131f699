"""Means, spreads, and paired differences of runs that share their seeds, and so their crops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.05  # the chance of a wrong verdict among those of a family


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


def corrected(differences: Sequence[Difference]) -> list[float]:
    """Holm's p-values of a family of questions, in its order.

    Of m questions asked at once, some would pass at 5% by chance; where corrected values are held
    against 5%, the chance that any verdict of the family is wrong stays below it. A question that
    has no answer yet is one of the m, with p = 1: what is told apart remains so when its runs
    arrive.
    """
    found, least = [1.0] * len(differences), 0.0
    for rank, i in enumerate(sorted(range(len(found)), key=lambda i: differences[i].p)):
        found[i] = least = max(least, min(1.0, differences[i].p * (len(found) - rank)))
    return found


def verdicts(differences: Sequence[Difference]) -> list[str]:
    """ "higher", "lower", "not told apart" or "too few seeds", for each question of a family."""
    told = []
    for difference, p in zip(differences, corrected(differences), strict=True):
        if len(difference.values) < 2:
            told.append("too few seeds")
        elif p > LEVEL:
            told.append("not told apart")
        else:
            told.append("higher" if difference.mean > 0 else "lower")
    return told


def smallest(difference: Difference, questions: int) -> float:
    """The least mean that its seeds and their spread would tell apart as the surest of a family.

    questions: of the family. Infinite for fewer than two seeds.
    """
    count = len(difference.values)
    if count < 2:
        return math.inf
    error = np.std(difference.values, ddof=1) / math.sqrt(count)
    return float(stats.t.isf(LEVEL / questions / 2, count - 1) * error)
