"""The grid's questions and what its runs answer: paired differences, in words and as tables."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from duc_dlc_jax import markdown
from duc_dlc_jax.ablate.grid import Question
from duc_dlc_jax.ablate.significance import Difference, corrected, paired, smallest, verdicts
from duc_dlc_jax.ablate.table import Table

COMPARED = ("mIoU", "PA", "boundary IoU")
SPOKEN = ("mIoU", "boundary IoU")  # of the verdict in words
UNLIKE = "†"
UNLIKE_SAID = (
    f"{UNLIKE} Runs of one seed had different devices or commits in the two variants, which are "
    "part of the difference."
)
OUTCOMES = {
    "higher": "exceeds the noise of the seeds, upwards",
    "lower": "exceeds the noise of the seeds, downwards",
    "not told apart": "does not exceed it",
    "too few seeds": "has too few seeds",
    "": "has no runs yet",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """By score: the differences of a question, their corrected p-value and the verdict.

    least: the smallest mean difference in mIoU that would have been told apart.
    """

    first: str
    second: str
    question: str
    marked: bool  # whether the two ran on unlike devices or commits
    differences: dict[str, Difference]
    p: dict[str, float]
    verdicts: dict[str, str]
    least: float

    @property
    def pair(self) -> str:
        return f"`{self.second}` - `{self.first}`{UNLIKE * self.marked}"

    @property
    def seeds(self) -> int:
        """Those that both variants have."""
        return len(self.differences["mIoU"].values)


def answers(table: Table, questions: Sequence[Question]) -> list[Answer]:
    """Of a family: the questions whose two variants have runs; the others count as asked."""
    found = {
        score: [paired(table.scores(a, score), table.scores(b, score)) for a, b, _ in questions]
        for score in COMPARED
    }
    p = {score: corrected(differences) for score, differences in found.items()}
    told = {score: verdicts(differences) for score, differences in found.items()}
    return [
        Answer(
            *question,
            marked=table.unlike(*question[:2]),
            differences={score: found[score][i] for score in COMPARED},
            p={score: p[score][i] for score in COMPARED},
            verdicts={score: told[score][i] for score in COMPARED},
            least=smallest(found["mIoU"][i], len(questions)),
        )
        for i, question in enumerate(questions)
        if table.has_runs(question)
    ]


def verdict(table: Table) -> str:
    """In words: each question, and which of them the seeds can answer. Empty without questions."""
    families = table.grid.comparisons
    if not any(families.values()):
        return ""
    best = max(table.runs, key=lambda name: np.mean(list(table.scores(name, "mIoU").values())))
    scores = list(table.scores(best, "mIoU").values())
    parts = [
        "## Verdict",
        "Mean differences over the seeds that both variants have, in points (hundredths), each "
        "with its own 95% confidence interval. *Higher* and *lower* are said where a difference "
        "exceeds the noise of the seeds after Holm's correction over all questions of its family; "
        "so an interval may leave out zero and the verdict still be *not told apart*.",
    ]
    marked = False
    for family, questions in families.items():
        found = answers(table, questions)
        if not found:
            continue
        marked |= any(answer.marked for answer in found)
        parts += [f"### {_capital(family)}"] * bool(family)
        parts += ["\n".join(_sentence(answer) for answer in found), _grouped(questions, found)]
    parts += [UNLIKE_SAID] * marked
    none = [
        f"{family} ({len(questions)} questions)"
        for family, questions in families.items()
        if not any(map(table.has_runs, questions))
    ]
    parts += [f"No runs answer yet: {', '.join(none)}."] * bool(none)
    parts.append(
        f"The highest mean mIoU of the {len(table.runs)} variants with runs is that of `{best}`, "
        f"{np.mean(scores):.4f} ({_count(len(scores), 'seed')}); that it is the highest is no test."
    )
    return "\n\n".join(parts)


def _sentence(answer: Answer) -> str:
    said = "; ".join(
        f"{score} {interval(answer.differences[score])}, **{answer.verdicts[score]}**"
        for score in SPOKEN
    )
    return f"- {_capital(answer.question)} ({answer.pair}, {_count(answer.seeds, 'seed')}): {said}."


def _grouped(questions: Sequence[Question], found: Sequence[Answer]) -> str:
    """Of a family, by what came of it in mIoU; and how large a difference had to be."""
    told = {(a.first, a.second): a.verdicts["mIoU"] for a in found}
    groups = collections.defaultdict(list)
    for first, second, question in questions:
        groups[told.get((first, second), "")].append(question)
    lines = [f"- {OUTCOMES[o]}: {'; '.join(groups[o])}." for o in OUTCOMES if groups[o]]
    least = [100 * a.least for a in found if np.isfinite(a.least)]
    power = ""
    if least:
        power = (
            "\n\nTo be told apart, with these seeds and their spread, a mean difference in mIoU "
            f"had to reach {_range(least)} points, depending on the question (the table below)."
        )
    return "In mIoU, of the difference each question asks about:\n\n" + "\n".join(lines) + power


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def differences(table: Table) -> list[str]:
    """A table of paired differences for each family that has runs."""
    parts = []
    for family, questions in table.grid.comparisons.items():
        found = answers(table, questions)
        if not found:
            continue
        rows = [
            [
                answer.pair,
                answer.question,
                str(answer.seeds),
                *(_cell(answer, score) for score in COMPARED),
                f"{100 * answer.least:.1f}" if np.isfinite(answer.least) else "-",
            ]
            for answer in found
        ]
        head = ["difference", "question", "seeds", *COMPARED, "mIoU told apart from"]
        asked = f"Holm over {_count(len(questions), 'question')} in each score"
        if len(found) < len(questions):
            asked += f", of which {len(questions) - len(found)} have no runs and count as p = 1"
        parts += [f"### {_capital(family)}"] * bool(family)
        parts += [f"{asked}.", markdown.table(head, rows)]
        parts += [UNLIKE_SAID] * any(answer.marked for answer in found)
    if not parts:
        return []
    text = (
        "Mean difference over the seeds that both variants have, in points (hundredths), with its "
        "95% confidence interval by Student's t, which is the question's alone. p is corrected "
        "(Holm) for one score and one family of questions, those without runs included, so that "
        "what is told apart remains so when their runs arrive; *higher* and *lower* are said at "
        "p ≤ 5%, and the chance that any of a family in one score is wrong is below that. *Not "
        "told apart* does not say that there is no difference: the last column is the smallest "
        "mean difference in mIoU that this spread over these seeds would have told apart from "
        "zero, as the surest of its family."
    )
    return ["## What the differences say", text, *parts]


def _cell(answer: Answer, score: str) -> str:
    difference = answer.differences[score]
    p = f", {_p(answer.p[score])}" if len(difference.values) > 1 else ""
    return f"{interval(difference)}{p}, {answer.verdicts[score]}"


def interval(difference: Difference) -> str:
    """Points with the half width of the 95% confidence interval, where there is one."""
    if not difference.values:
        return "no common seed"
    if len(difference.values) < 2:
        return f"{100 * difference.mean:+.2f}"
    return f"{100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
