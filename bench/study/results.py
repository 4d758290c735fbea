"""What the records say of each group: the learning rate that was chosen, and the test metric of every seed."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .cells import Group, choose_rate
from .methods import Method
from .plan import Block
from .statistics import Difference, holm, paired
from .store import Store

OPTIMIZER_TITLES = {"adamw": "AdamW", "sgd": "SGD with momentum"}


class Budget(NamedTuple):
    """What a table compares methods under."""

    optimizer: str
    steps: int
    samples: int | None

    @property
    def title(self) -> str:
        """Of the optimizer."""
        return OPTIMIZER_TITLES[self.optimizer]

    @property
    def short(self) -> str:
        """Without the optimizer."""
        return f"{self.steps} steps" + ("" if self.samples is None else f" on {self.samples} samples")

    def __str__(self) -> str:
        return f"{self.title}, {self.short}"


class Result(NamedTuple):
    """Of one group of which every cell is there."""

    group: Group
    rate: float | None
    """None where every learning rate diverged."""
    test: dict[int, float]
    """The test metric by seed; nan where a run broke down."""
    diverged: int
    """Seeds whose training broke down at the chosen learning rate."""

    @property
    def at_the_edge(self) -> bool:
        """Whether a learning rate outside the grid might be better."""
        rates = self.group.rates
        return len(rates) > 1 and self.rate in (rates[0], rates[-1])

    @property
    def usable(self) -> bool:
        """Whether every seed has a number."""
        return bool(self.test) and all(math.isfinite(value) for value in self.test.values())


Results = dict[tuple[Budget, str, str], Result]
"""By budget, name of the task and name of the method."""


def collect(blocks: Iterable[Block], store: Store) -> Results:
    """The groups of the plan that are complete, in the plan's order."""
    found: Results = {}
    for block in blocks:
        for group in block.groups:
            if not all(settings in store for settings in group.tuning()):
                continue
            rate = choose_rate(group, [store[settings] for settings in group.tuning()])
            finals = [] if rate is None else group.final(rate)
            if not all(settings in store for settings in finals):
                continue
            records = [store[settings] for settings in finals]
            values = {r["settings"]["seed"]: r["test"][group.task.metric] for r in records}
            test = {seed: math.nan if value is None else value for seed, value in values.items()}
            key = (Budget(group.optimizer, group.steps, group.samples), group.task.name, group.method.name)
            found[key] = Result(group, rate, test, sum(r["diverged"] for r in records))
    return found


def budgets(results: Results) -> list[Budget]:
    """Those that there are results of, in order."""
    return list(dict.fromkeys(budget for budget, _, _ in results))


def tasks_of(results: Results, budget: Budget) -> list[str]:
    """The tasks with results under `budget`, in order."""
    return list(dict.fromkeys(task for found, task, _ in results if found == budget))


def methods_of(results: Results, budget: Budget) -> list[str]:
    """The methods with results under `budget`, in order."""
    return list(dict.fromkeys(method for found, _, method in results if found == budget))


class Comparison(NamedTuple):
    """One method minus another on one task, where both have the same seeds."""

    task: str
    other: str
    difference: Difference
    p: float
    """Holm's, of all comparisons made together."""
    sign: int
    """1 where a higher metric is better, else -1."""

    @property
    def verdict(self) -> int:
        """1 if better, -1 if worse, 0 if the two are not told apart at 5%."""
        gain = self.sign * self.difference.mean.value
        return 0 if self.p >= 0.05 else 1 if gain > 0 else -1


def compare(results: Results, budget: Budget, ours: Method, others: Sequence[str]) -> list[Comparison]:
    """`ours` minus each of `others` on each task where both are usable; one family of tests."""
    found = []
    for task in tasks_of(results, budget):
        mine = results.get((budget, task, ours.name))
        for other in others:
            theirs = results.get((budget, task, other))
            if (
                mine
                and theirs
                and mine.usable
                and theirs.usable
                and len(mine.test) > 1
                and set(mine.test) == set(theirs.test)
            ):
                found.append((task, other, paired(mine.test, theirs.test), mine.group.task.sign))
    adjusted = holm([difference.p for _, _, difference, _ in found])
    return [Comparison(task, other, d, p, sign) for (task, other, d, sign), p in zip(found, adjusted)]


def rank_scores(results: Results, chosen: Iterable[Budget], methods: Sequence[str]) -> dict[str, list[float]]:
    """The mean test metric (higher is better) of each method, on the tasks and budgets where all of them are usable."""
    scores: dict[str, list[float]] = {name: [] for name in methods}
    for budget in chosen:
        for task in tasks_of(results, budget):
            here = [results.get((budget, task, name)) for name in methods]
            if all(result and result.usable for result in here):
                for name, result in zip(methods, here):
                    # Means that are equal but for rounding share a rank, whatever the order they were added up in.
                    mean = math.fsum(result.test.values()) / len(result.test)
                    scores[name].append(result.group.task.sign * round(mean, 9))
    return scores
