"""The three sentences and the figure that README.md has of the study."""

import re
from pathlib import Path

from . import plan
from .cells import SEEDS
from .methods import ALLORA
from .plan import Block
from .results import OPTIMIZER_TITLES, Comparison, budgets, collect, compare
from .store import Store

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
    """A sentence for each optimizer, one on where to read more, and the figure; without results, that there are none."""
    results = collect(blocks, store)
    others = [method.name for method in plan.RIVALS]
    said = []
    for optimizer, title in OPTIMIZER_TITLES.items():
        here = [budget for budget in budgets(results) if budget.optimizer == optimizer]
        found = [c for budget in here for c in compare(results, budget, ALLORA, others)]
        tallies = [_tally(other, cases) for other in others if (cases := [c for c in found if c.other == other])]
        if tallies:
            said.append(
                f"Under {title}, {ALLORA.name} is better / worse / not told apart in so many cases of task and length of "
                f"training, with this mean lead in points of accuracy: {'; '.join(tallies)}."
            )
    if not said:
        return NOT_YET
    done, total = plan.counts(plan.whole(blocks), store)
    state = "the grid is complete" if done == total else f"{done} of the grid's {total} cells are there"
    return (
        f"{' '.join(said)} The others are PEFT's, and each is at its own best learning rate of one grid, "
        f"with {len(SEEDS)} seeds; tables, the three flaws and the limits are on [the study's page](docs/study.md) "
        f"({state}).\n\n![ALLoRA minus PEFT's methods: points of accuracy](docs/study-differences.png)"
    )


def _tally(other: str, cases: list[Comparison]) -> str:
    better, worse, same = (sum(c.verdict == verdict for c in cases) for verdict in (1, -1, 0))
    points = [100 * c.difference.mean.value for c in cases if c.sign == 1]
    mean = f" ({sum(points) / len(points):+.1f})" if points else ""
    return f"against {other} {better} / {worse} / {same}{mean}"
