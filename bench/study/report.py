"""Writes the page of the study and its plots from the records alone. Every statement about an outcome is made from numbers."""

from collections.abc import Sequence
from pathlib import Path

from bench.markdown import table

from . import advice, figures, flaw_report, plan, sections, verdicts
from .cells import SEEDS
from .methods import ALLORA, ALLORA_PLUS, LORA, LORA_2, LORA_2_DROPOUT, LORA_DROPOUT, LORA_PLUS, LORAPLUS_RATIO
from .plan import Block
from .results import OPTIMIZER_TITLES, Budget, budgets, collect, compare, rank_scores, tasks_of
from .statistics import ranking
from .store import Store
from .tasks import TASKS

COMMAND = "python -m bench.study"
OTHERS = [method.name for method in plan.RIVALS]
TITLES = {name: task.title for name, task in TASKS.items()}


class Numbered:
    """Counts tables and figures, so that a sentence can name the one it is about."""

    def __init__(self, page: Path) -> None:
        self.page, self.tables, self.figures = page, 0, 0

    def table(self, caption: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        """The next table, under its caption."""
        self.tables += 1
        return f"**Table {self.tables}.** {caption}\n\n{table(list(headings), [list(row) for row in rows])}"

    def figure(self, figure, name: str, caption: str, options: str) -> str:
        """Save the next figure beside the page; the text to put there, with the command that makes it."""
        self.figures += 1
        figures.save(figure, self.page.with_name(f"study-{name}.png"))
        command = f"{COMMAND} {options}".strip()
        return f"![{caption}](study-{name}.png)\n\n**Figure {self.figures}.** {caption}\n\n```console\n$ {command}\n```"


def write(store: Store, blocks: list[Block], page: Path) -> None:
    """Write `page` and the plots beside it; a plot that there are no records for is removed."""
    page.parent.mkdir(parents=True, exist_ok=True)
    for old in page.parent.glob("study-*.png"):
        old.unlink()
    page.write_text(text(store, blocks, page), encoding="utf-8")


def text(store: Store, blocks: list[Block], page: Path) -> str:
    """The page; saves the plots on the way."""
    results, numbered = collect(blocks, store), Numbered(page)
    comparisons = {budget: compare(results, budget, ALLORA, OTHERS) for budget in budgets(results)}
    # The parts are written in the order of their tables and figures; the summary, which names them, comes first on the page.
    said: list[str] = []
    state = sections.state(numbered, blocks, store)
    tables: dict[Budget, int] = {}
    rule_tables: dict[Budget, list[int]] = {}
    body = [
        _compared(numbered, results, comparisons, said),
        *(_budget(numbered, results, budget, comparisons[budget], tables) for budget in budgets(results)),
    ]
    body += [
        _ranked(numbered, results, said),
        _combined(numbered, results, said),
        sections.rules(numbered, results, rule_tables),
        sections.sides(numbered, results),
        sections.dropout(numbered, flaw_report.records_of("dropout", blocks, store), said),
        _dropped(numbered, results, said),
        sections.norms(numbered, flaw_report.records_of("norms", blocks, store), said),
        sections.scaling(numbered, flaw_report.records_of("scaling", blocks, store), said),
    ]
    head = [
        "# Does ALLoRA help, and when?",
        f"This page is written by `{COMMAND} --report` from the records of the runs; do not edit it.",
        "## In short",
        f'"Not told apart" means {verdicts.NOT_TOLD_APART}.',
        "\n".join(f"- {sentence}" for sentence in said) or "No group of cells is complete yet.",
        advice.choice(results, comparisons, tables, rule_tables),
        sections.INTRODUCTION,
        state,
    ]
    return "\n\n".join(part for part in [*head, *body, sections.LIMITS] if part) + "\n"


def _compared(numbered: Numbered, results, comparisons, said: list[str]) -> str:
    drawn = _tallied(numbered, results, [(ALLORA, OTHERS)], f"{ALLORA.name} against each other method", said)
    if not drawn:
        return ""
    parts = ["## Against LoRA, DoRA and LoRA+"]
    shown = [(budget, here) for budget, here in comparisons.items() if any(c.sign == 1 for c in here)]
    if shown:
        caption = f"{ALLORA.name} minus each other method: accuracy on the test part, {len(SEEDS)} seeds"
        figure = figures.differences(shown, TITLES, ALLORA.name)
        parts.append(numbered.figure(figure, "differences", caption, "--only short main sgd samples decoder long"))
    return "\n\n".join([*parts, drawn])


def _combined(numbered: Numbered, results, said: list[str]) -> str:
    """ALLoRA at LoRA+'s learning rates, against each of the two."""
    times = f"lora_B at {LORAPLUS_RATIO} times lora_A's learning rate"
    caption = f"{ALLORA_PLUS.name}, {times}, against each of the two alone"
    drawn = _tallied(numbered, results, [(ALLORA_PLUS, [LORA_PLUS.name, ALLORA.name])], caption, said)
    why = "Added when the first results were known, in which LoRA+ came first."
    return f"## ALLoRA with LoRA+\n\n{why}\n\n{drawn}" if drawn else ""


def _dropped(numbered: Numbered, results, said: list[str]) -> str:
    """LoRA with dropout against itself without."""
    pairs = [(LORA_DROPOUT, [LORA.name]), (LORA_2_DROPOUT, [LORA_2.name])]
    caption = f"LoRA with dropout {LORA_DROPOUT.dropout} against the same without dropout"
    drawn = _tallied(numbered, results, pairs, caption, said)
    return f"### What it does to the accuracy\n\n{drawn}" if drawn else ""


def _tallied(numbered: Numbered, results, pairs, caption: str, said: list[str]) -> str:
    """A table of how each method of `pairs` fares against its others, and a sentence of each for every optimizer; nothing where
    none of them have met."""
    rows, sentences = [], []
    for ours, others in pairs:
        for name, title in OPTIMIZER_TITLES.items():
            if found := verdicts.tallies(results, name, others, ours):
                rows += verdicts.rows(title, found)
                sentences.append(verdicts.sentence(title, found, ours))
    if not rows:
        return ""
    drawn = numbered.table(f"{caption}. {verdicts.COLUMNS}", verdicts.HEADINGS, rows)
    said += [f"{sentence} (Table {numbered.tables})." for sentence in sentences]
    return drawn


def _budget(numbered: Numbered, results, budget, comparisons, tables: dict[Budget, int]) -> str:
    tasks = tasks_of(results, budget)
    methods = sections.shown_methods(results, budget)
    if not methods:
        return ""
    rows = [[name, *(sections.cell(results.get((budget, task, name))) for task in tasks)] for name in methods]
    caption = (
        f"{budget}: test accuracy in percent (of Shakespeare: perplexity, lower is better), mean ± half the 95% interval; in "
        "brackets the learning rate chosen on the validation part, with ! where it is the grid's first or last"
    )
    parts = [f"### {budget}", numbered.table(caption, ["method", *(TITLES[t] for t in tasks)], rows)]
    parts += sections.below_the_head(results, budget, methods, numbered.tables)
    if comparisons:
        parts.append(
            numbered.table(
                f"{budget}: {ALLORA.name} minus the other, same seeds, with Holm's p over this table; + or − where p < 0.05",
                ["minus", *(TITLES[t] for t in tasks)],
                [
                    [other, *(sections.difference(comparisons, task, other) for task in tasks)]
                    for other in OTHERS
                    if any(c.other == other for c in comparisons)
                ],
            )
        )
        tables[budget] = numbered.tables
    return "\n\n".join(parts)


def _ranked(numbered: Numbered, results, said: list[str]) -> str:
    names = [method.name for method in plan.COMPARED]
    found = {}
    for optimizer, title in OPTIMIZER_TITLES.items():
        here = ranking(rank_scores(results, [b for b in budgets(results) if b.optimizer == optimizer], names))
        if here:
            found[title] = here
    if not found:
        return ""
    caption = (
        "Mean ranks over tasks and budgets; a bar joins what Nemenyi's critical difference (5%) does not tell apart"
    )
    drawn = numbered.figure(figures.ranks(found), "ranks", caption, "--only short main sgd samples decoder long")
    for title, here in found.items():
        best = min(here.ranks, key=here.ranks.__getitem__)
        order = ", ".join(f"{name} {here.ranks[name]:.2f}" for name in sorted(here.ranks, key=here.ranks.__getitem__))
        differ = "are not told apart" if here.p >= 0.05 else "are told apart"
        said.append(
            f"Ranked over {here.cases} cases under {title}, {best} comes first ({order}); the methods {differ} by "
            f"Friedman's test (p = {here.p:.2g}, Figure {numbered.figures})."
        )
    return "## Ranking\n\n" + drawn
