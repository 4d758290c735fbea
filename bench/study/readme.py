"""The three sentences and the figure that README.md has of the study."""

import re
from pathlib import Path

from . import plan
from .cells import SEEDS
from .methods import ALLORA, LORA
from .plan import Block
from .results import budgets, collect, compare
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
    """Three sentences and the figure; without results, that there are none."""
    results = collect(blocks, store)
    others = [method.name for method in plan.COMPARED if method != ALLORA]
    found = [c for budget in budgets(results) for c in compare(results, budget, ALLORA, others)]
    against = {other: [c for c in found if c.other == other] for other in others}
    plain = against[LORA.name]
    points = [100 * c.difference.mean.value for c in plain if c.sign == 1]
    if not points:
        return NOT_YET
    rest = "; ".join(
        f"against {name} {_tally(against[name])}" for name in others if name != LORA.name and against[name]
    )
    rest = f" {rest[0].upper()}{rest[1:]}." if rest else ""
    done, total = plan.counts(plan.whole(blocks), store)
    state = "the grid is complete" if done == total else f"{done} of the grid's {total} cells are there"
    mean = f"{sum(points) / len(points):+.1f} points of accuracy"
    cases = f"{len(plain)} case{'s' if len(plain) > 1 else ''}"
    return (
        f"`{ALLORA.name}` against PEFT's methods, each at its own best learning rate of one grid, {len(SEEDS)} seeds, in "
        f"{cases} of task, optimizer and length of training: against LoRA it is {_tally(plain)} (on average {mean}).{rest} "
        f"Tables, the three flaws and the limits are on [the study's page](docs/study.md); {state}.\n\n"
        "![ALLoRA minus LoRA, DoRA and LoRA+: points of accuracy](docs/study-differences.png)"
    )


def _tally(found: list) -> str:
    better, worse, same = (sum(c.verdict == verdict for c in found) for verdict in (1, -1, 0))
    return f"better in {better}, worse in {worse} and not told apart in {same}"
