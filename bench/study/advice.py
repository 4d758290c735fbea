"""What to choose, as far as the numbers say: a method for each budget, an optimizer, a rule and η²."""

from . import plan
from .methods import ALLORA, ALLORA_RULES, LORA
from .results import Budget, Comparison, Results, budgets, compare, tasks_of
from .sections import mean_of, rule_tasks, signed, table_names
from .statistics import mean_interval
from .tasks import TASKS


def choice(
    results: Results,
    comparisons: dict[Budget, list[Comparison]],
    tables: dict[Budget, int],
    rule_tables: dict[Budget, list[int]],
) -> str:
    """What to choose for which budget, by mean test metric and by the tests."""
    names, lines = [method.name for method in plan.COMPARED], []
    for budget in budgets(results):
        wins: dict[str, list[str]] = {}
        for task in tasks_of(results, budget):
            here = {n: results[budget, task, n] for n in names if (budget, task, n) in results}
            here = {n: r for n, r in here.items() if r.usable}
            if len(here) == len(names):
                best = max(
                    here, key=lambda n: here[n].group.task.sign * mean_interval(list(here[n].test.values())).value
                )
                wins.setdefault(best, []).append(TASKS[task].title)
        if wins:
            best = "; ".join(f"{name} has the best mean on {', '.join(tasks)}" for name, tasks in wins.items())
            apart = [c for c in comparisons[budget] if c.verdict]
            better, worse = (sum(c.verdict == v for c in apart) for v in (1, -1))
            lines.append(
                f"- {budget}: {best}. Of {len(comparisons[budget])} comparisons of {ALLORA.name} with another method {better} "
                f"came out for it, {worse} against it, and {len(comparisons[budget]) - len(apart)} were not told apart "
                f"(Table {tables[budget]})."
            )
    if not lines:
        return ""
    rules = _best_rules(results, rule_tables)
    return "\n\n".join(["## What to choose", "\n".join([*lines, *_optimizers(results, tables), *rules])])


def _best_rules(results: Results, tables: dict[Budget, list[int]]) -> list[str]:
    lines = []
    for budget in budgets(results):
        tasks = rule_tasks(results, budget)
        if not tasks:
            continue
        names = [m.name for m in ALLORA_RULES]
        means = {n: sum(mean_of(results[budget, t, n]) for t in tasks) / len(tasks) for n in names}
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        apart = [c for c in compare(results, budget, ALLORA, [n for n in names if n != ALLORA.name]) if c.verdict]
        lines.append(
            f"- Which rule and η², {budget}: {best} has the best mean accuracy ({100 * means[best]:.1f}), {worst} the lowest "
            f"({100 * means[worst]:.1f}), {ALLORA.name} {100 * means[ALLORA.name]:.1f}; of the comparisons with the other "
            f"rules {sum(c.verdict == -1 for c in apart)} came out against it and {sum(c.verdict == 1 for c in apart)} for it "
            f"({table_names(tables[budget])}). The best of fifteen by test accuracy is partly the luckiest."
        )
    return lines


def _optimizers(results: Results, tables: dict[Budget, int]) -> list[str]:
    """AdamW against SGD where both have run, and what of ALLoRA's difference to LoRA is left under each."""
    lines = []
    for budget in budgets(results):
        twin = budget._replace(optimizer="sgd")
        if budget.optimizer == "sgd" or twin not in tables or budget not in tables:
            continue
        both, names = (budget, twin), (LORA.name, ALLORA.name)
        cells = {t: [results.get((b, t, n)) for b in both for n in names] for t in tasks_of(results, budget)}
        tasks = [
            t for t, found in cells.items() if all(found) and all(r.usable and r.group.task.sign == 1 for r in found)
        ]
        if not tasks:
            continue
        means = {
            (b, n): 100 * sum(mean_of(results[b, t, n]) for t in tasks) / len(tasks) for b in both for n in names
        }  # fmt: skip
        said = "; ".join(
            f"under {b.title} {ALLORA.name} reaches {means[b, ALLORA.name]:.1f}% and LoRA {means[b, LORA.name]:.1f}%, "
            f"a difference of {signed(means[b, ALLORA.name] - means[b, LORA.name])} points"
            for b in both
        )
        lines.append(
            f"- Which optimizer, {budget.short}, mean accuracy over {len(tasks)} task{'s' if len(tasks) > 1 else ''}: {said} "
            f"({table_names([tables[b] - 1 for b in both])})."
        )
    return lines
