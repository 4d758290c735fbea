"""The answer and the figure that README.md has of the study."""

import re
from collections.abc import Sequence
from pathlib import Path

from . import plan, verdicts
from .cells import SEEDS
from .plan import Block
from .results import OPTIMIZER_TITLES, collect
from .store import Store
from .tasks import TASKS
from .verdicts import Tally

_BLOCK = re.compile(r"(?<=<!-- study:begin -->\n).*?(?=\n<!-- study:end -->)", re.DOTALL)
NOT_YET = "**Not yet run**: `make study` fills [the page](docs/study.md)."


def write(store: Store, blocks: list[Block], readme: Path) -> None:
    """Replace what stands between the markers of `readme`.

    Raises:
        ValueError: there are no markers.
    """
    page = readme.read_text(encoding="utf-8")
    if not _BLOCK.search(page):
        raise ValueError(f"{readme} has no <!-- study:begin --> and <!-- study:end --> with a line between them")
    text = summary(store, blocks)
    readme.write_text(_BLOCK.sub(lambda _: text, page), encoding="utf-8")


def summary(store: Store, blocks: list[Block]) -> str:
    """The answer in plain words, a sentence for each optimizer, where to read more, and the figure; without results, that
    there are none."""
    results = collect(blocks, store)
    others = [method.name for method in plan.RIVALS]
    found = {title: verdicts.tallies(results, name, others) for name, title in OPTIMIZER_TITLES.items()}
    said = [_counted(title, tallies) for title, tallies in found.items() if tallies]
    if not said:
        return NOT_YET
    met = [tally for tallies in found.values() for tally in tallies]
    tasks = {c.task for tally in met for _, c in tally.cases}
    models = {TASKS[task].model for task in tasks}
    done, total = plan.counts(plan.whole(blocks), store)
    state = "the grid is complete" if done == total else f"{done} of the grid's {total} cells are there"
    names = [name for name in others if any(tally.other == name for tally in met)]
    answer = _answer(met, " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    return (
        f"**{answer}** So our tests say of {_many(len(models), 'small model')} and {_many(len(tasks), 'task')}, with "
        f"{len(SEEDS)} seeds and each method (the others are PEFT's) at its own best learning rate. {' '.join(said)} A case is "
        f"a task and a length of training; a difference counts at p < 0.05 after Holm's correction for the comparisons of "
        f"its table. More on [the study's page](docs/study.md) "
        f"({state}).\n\n"
        "![ALLoRA minus PEFT's methods: points of accuracy](docs/study-differences.png)"
    )


def _answer(met: Sequence[Tally], others: str) -> str:
    """Alike where at most one comparison in ten came out for either side."""
    outcomes = [c.verdict for tally in met for _, c in tally.cases]
    if 10 * sum(map(abs, outcomes)) <= len(outcomes):
        return (
            f"About as well as {others}. Choose this library for its speed and its features, not for a better result."
        )
    return f"{'Better' if sum(outcomes) > 0 else 'Worse'} than {others}."


def _counted(title: str, tallies: Sequence[Tally]) -> str:
    cases = {(budget, c.task) for tally in tallies for budget, c in tally.cases}
    comparisons, gains = sum(len(tally.cases) for tally in tallies), sum(len(tally.of(1)) for tally in tallies)
    losses = [f"{tally.other} on {case}" for tally in tallies for case in tally.of(-1)]
    named = f" (against {', '.join(losses)})" if 0 < len(losses) < 4 else ""
    return (
        f"Under {title}: {_many(len(cases), 'case')}, {_many(comparisons, 'comparison')}, {_many(gains, 'gain')}, "
        f"{_many(len(losses), 'loss', 'es')}{named}."
    )


def _many(count: int, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else ending}"
