"""How ALLoRA fares against each other method over all cases of an optimizer: as a sentence, and as rows of a table."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from .methods import ALLORA, Method
from .results import Budget, Comparison, Results, budgets, compare
from .sections import signed
from .tasks import TASKS

HEADINGS = ("optimizer", "against", "cases", "better", "worse", "not told apart", "mean lead", "half interval")
NOT_TOLD_APART = (
    "no significant difference (p ≥ 0.05 by a paired t-test over seeds, with Holm's correction within a table)"
)
COLUMNS = (
    "A case is a task and a budget; not told apart: p ≥ 0.05; mean lead: points of accuracy, mean over the cases that are "
    "measured in it; half interval: half the 95% interval of a case's difference, in points, median over the cases"
)
"""What the headings mean, for a caption."""


class Tally(NamedTuple):
    """The cases in which a method meets one other under one optimizer."""

    other: str
    cases: list[tuple[Budget, Comparison]]

    def of(self, verdict: int) -> list[str]:
        """The cases that came out so, in words."""
        return [f"{TASKS[c.task].title} at {budget.short}" for budget, c in self.cases if c.verdict == verdict]

    @property
    def lead_in_words(self) -> str:
        """The lead, and over how many cases it is a mean where that is not all of them."""
        measured = sum(c.sign == 1 for _, c in self.cases)
        over = "" if measured == len(self.cases) else f" over the {measured} with an accuracy"
        return f"mean {self.lead} points{over}" if measured else ""

    @property
    def lead(self) -> str:
        """In points of accuracy; empty where no task is measured in it."""
        points = [100 * c.difference.mean.value for _, c in self.cases if c.sign == 1]
        return signed(fmean(points)) if points else ""

    @property
    def half(self) -> str:
        """How wide the intervals are, in points of accuracy."""
        points = [100 * c.difference.mean.half for _, c in self.cases if c.sign == 1]
        return f"±{median(points):.1f}" if points else ""


def tallies(results: Results, optimizer: str, others: Sequence[str], ours: Method = ALLORA) -> list[Tally]:
    """A tally for each of `others` that has met `ours`."""
    found = [
        (budget, c)
        for budget in budgets(results)
        if budget.optimizer == optimizer
        for c in compare(results, budget, ours, others)
    ]
    counted = [Tally(other, [(budget, c) for budget, c in found if c.other == other]) for other in others]
    return [tally for tally in counted if tally.cases]


def sentence(title: str, found: Sequence[Tally], ours: Method = ALLORA) -> str:
    """The outcome under the optimizer called `title`, without a full stop."""
    same, parts = [], []
    for tally in found:
        cases = f"{len(tally.cases)} case{'s' if len(tally.cases) > 1 else ''}"
        lead = tally.lead_in_words
        better, worse = len(tally.of(1)), len(tally.of(-1))
        if not better and not worse:
            same.append(f"{tally.other} ({', '.join(part for part in (cases, lead) if part)})")
            continue
        counts = f"in {better} and worse in {worse}" if better and worse else f"in {better or worse}"
        words = f"{'better' if better else 'worse'} than {tally.other} {counts} of {cases}"
        parts.append(f"{words} ({lead})" if lead else words)
    if same:
        parts.append(f"not told apart from {_any_of(same)}")
    return f"Under {title}, {ours.name} is {'; '.join(parts)}"


def rows(title: str, found: Sequence[Tally]) -> list[list[object]]:
    """For the table under `HEADINGS`."""
    return [
        [title, t.other, len(t.cases), _named(t.of(1)), _named(t.of(-1)), len(t.of(0)), t.lead, t.half] for t in found
    ]


def _named(cases: Sequence[str]) -> str:
    return f"{len(cases)}: {', '.join(cases)}" if cases else "0"


def _any_of(words: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
