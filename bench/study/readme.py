"""The three sentences and the figure that README.md has of the study."""

import re
from pathlib import Path

from . import plan, verdicts
from .cells import SEEDS
from .plan import Block
from .results import OPTIMIZER_TITLES, collect
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
    found = {title: verdicts.tallies(results, name, others) for name, title in OPTIMIZER_TITLES.items()}
    said = [f"{verdicts.sentence(title, tallies)}." for title, tallies in found.items() if tallies]
    if not said:
        return NOT_YET
    done, total = plan.counts(plan.whole(blocks), store)
    state = "the grid is complete" if done == total else f"{done} of the grid's {total} cells are there"
    return (
        f"{' '.join(said)} A case is a task and a length of training, points are of accuracy; the others are "
        f"PEFT's, each method is at its own best learning rate of one grid, with {len(SEEDS)} seeds, and tables, the three "
        f"flaws and the limits are on [the study's page](docs/study.md) ({state}).\n\n"
        "![ALLoRA minus PEFT's methods: points of accuracy](docs/study-differences.png)"
    )
