"""What the report computes of the records: means with intervals, paired tests over seeds, ranks with a critical difference."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Mean(NamedTuple):
    """A mean and half the width of its 95% interval (nan for a single value)."""

    value: float
    half: float


def mean_interval(values: Sequence[float]) -> Mean:
    """Student's interval of the mean of independent values."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Mean(mean, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Mean(mean, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error)


class Difference(NamedTuple):
    """Of two methods with the same seeds: the mean difference, half its 95% interval, and the p of a paired t-test."""

    mean: Mean
    p: float


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """`ours` minus `theirs`, each by seed. Where all differences are equal p is 1 (they are zero) or 0.

    Raises:
        ValueError: fewer than two seeds, or not the same.
    """
    if set(ours) != set(theirs) or len(ours) < 2:
        raise ValueError(f"a paired test needs the same two or more seeds, got {sorted(ours)} and {sorted(theirs)}")
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    mean = mean_interval(differences)
    if mean.half == 0:
        return Difference(mean, 1.0 if mean.value == 0 else 0.0)
    return Difference(
        mean, float(stats.ttest_rel([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(ours)]).pvalue)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's p values of a family of tests, in the same order."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


class Ranking(NamedTuple):
    """Mean ranks (1 is best) over `cases`, Friedman's p, and Nemenyi's critical difference between two mean ranks."""

    ranks: dict[str, float]
    cases: int
    p: float
    critical: float


def ranking(scores: Mapping[str, Sequence[float]]) -> Ranking | None:
    """Rank methods by their scores (higher is better) on the same cases.

    None for fewer than three methods or two cases, of which Friedman's test says nothing.
    """
    names = list(scores)
    table = np.array([scores[name] for name in names], dtype=float).T
    if len(names) < 3 or len(table) < 2:
        return None
    ranks = stats.rankdata(-table, axis=1)
    k, n = len(names), len(table)
    # Where no case tells any two methods apart there is nothing to test.
    p = 1.0 if (ranks == ranks[:, :1]).all() else float(stats.friedmanchisquare(*table.T).pvalue)
    critical = float(stats.studentized_range.ppf(LEVEL, k, np.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    return Ranking(dict(zip(names, ranks.mean(axis=0).tolist())), n, p, critical)


def cliques(found: Ranking) -> list[list[str]]:
    """The largest sets of methods whose mean ranks lie within the critical difference."""
    order = sorted(found.ranks, key=found.ranks.__getitem__)
    sets: list[list[str]] = []
    for i, first in enumerate(order):
        members = [name for name in order[i:] if found.ranks[name] - found.ranks[first] <= found.critical]
        if len(members) > 1 and not any(set(members) <= set(other) for other in sets):
            sets.append(members)
    return sets


def running_mean_spread(values: Sequence[float], steps: int, draws: int = 2000) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of the mean of `steps` of the values, drawn at random with replacement."""
    generator = np.random.default_rng(steps)
    means = generator.choice(np.asarray(values), size=(draws, steps)).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
