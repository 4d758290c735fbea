"""The plots of the study. The same records give the same bytes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .results import Budget, Comparison
from .statistics import Ranking, cliques, running_mean_spread

COLORS = {
    "LoRA": "#e0904a",
    "LoRA α/r=2": "#b8860b",
    "LoRA dropout 0.1": "#d1495b",
    "LoRA α/r=2 dropout 0.1": "#7a3e00",
    "DoRA": "#66a182",
    "LoRA+": "#8d6aa8",
    "ALLoRA row η²=4": "#1f4e79",
}
_OTHER = "#777777"


def save(figure: Figure, file: Path) -> None:
    """As PNG, with no date and no version inside."""
    figure.savefig(file, format="png", metadata={"Software": None})


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def differences(shown: Sequence[tuple[Budget, Sequence[Comparison]]], titles: dict[str, str], ours: str) -> Figure:
    """Points of accuracy that `ours` is ahead of the others, with 95% intervals."""
    rows = [(budget, c) for budget, comparisons in shown for c in comparisons if c.sign == 1]
    labels = list(dict.fromkeys((budget, c.task) for budget, c in rows))
    others = list(dict.fromkeys(c.other for _, c in rows))
    figure = _figure(8.5, 1.4 + 0.42 * len(labels))
    axes = figure.subplots()
    axes.axvline(0.0, color="black", linewidth=1)
    for shift, other in enumerate(others):
        points = [
            (100 * c.difference.mean.value, labels.index((b, c.task)) + 0.18 * (shift - (len(others) - 1) / 2),
             100 * c.difference.mean.half)
            for b, c in rows
            if c.other == other
        ]  # fmt: skip
        x, y, error = zip(*points)
        axes.errorbar(
            x, y, xerr=error, fmt="o", markersize=4, capsize=2, color=COLORS.get(other, _OTHER), label=f"minus {other}"
        )
    axes.set_yticks(range(len(labels)), [f"{titles[task]}: {budget}" for budget, task in labels])
    axes.invert_yaxis()
    axes.set_xlabel(f"{ours}, points of test accuracy ahead (95% interval over seeds)", fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(others))
    _tidy(axes)
    return figure


def ranks(found: dict[str, Ranking]) -> Figure:
    """Mean ranks by optimizer; a bar joins methods that the critical difference does not tell apart."""
    figure = _figure(8, 0.4 + 1.9 * len(found))
    for axes, (title, ranking) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items()):
        order = sorted(ranking.ranks, key=ranking.ranks.__getitem__)
        for place, name in enumerate(order):
            color = COLORS.get(name, _OTHER)
            axes.plot([ranking.ranks[name]] * 2, [0, place + 1], color=color, linewidth=1)
            axes.plot(ranking.ranks[name], 0, "o", color=color)
            axes.annotate(
                f" {name} ({ranking.ranks[name]:.2f})", (ranking.ranks[name], place + 1), fontsize=8, va="center"
            )
        for level, members in enumerate(cliques(ranking)):
            ends = [ranking.ranks[members[0]], ranking.ranks[members[-1]]]
            axes.plot(ends, [-0.6 - 0.5 * level] * 2, color="black", linewidth=3)
        axes.set(xlim=(1, len(order)), yticks=[])
        axes.set_title(
            f"{title}: {ranking.cases} cases, critical difference {ranking.critical:.2f}", fontsize=9, loc="left"
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("mean rank (1 is best)", fontsize=8)
    return figure


def dropout(records: Sequence[dict], steps: Sequence[int]) -> Figure:
    """95% of the estimates of dropout's addition to the loss, by the number of masks seen; the limit is the mean of all."""
    figure = _figure(4.2 * len(records), 3.4)
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records):
        values, name = record["differences"], record["settings"]["method"]["name"]
        bounds = [running_mean_spread(values, count) for count in steps]
        limit = sum(values) / len(values)
        axes.fill_between(steps, *zip(*bounds), alpha=0.3, color=COLORS.get(name, _OTHER), label="95% of estimates")
        axes.axhline(limit, color=COLORS.get(name, _OTHER), label=f"mean of {len(values)} masks")
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="steps (one mask each)", ylabel="dropout's addition to the loss (nats)")
        axes.set_title(name, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
    return figure


def norms(records: Sequence[dict]) -> Figure:
    """‖B‖ and ‖BA‖ by step, a line a seed, a row an optimizer."""
    optimizers = list(dict.fromkeys(r["settings"]["optimizer"]["name"] for r in records))
    figure = _figure(8.5, 2.9 * len(optimizers))
    for row, optimizer in zip(figure.subplots(len(optimizers), 2, squeeze=False), optimizers):
        for axes, key, label in zip(row, ("B", "BA"), ("‖B‖", "α/r ‖BA‖")):
            named = set()
            for record in records:
                name = record["settings"]["method"]["name"]
                if record["settings"]["optimizer"]["name"] == optimizer and record[key]:
                    axes.plot(
                        range(1, len(record[key]) + 1), record[key], color=COLORS.get(name, _OTHER), linewidth=1,
                        label=None if name in named else name,
                    )  # fmt: skip
                    named.add(name)
            axes.set(xlabel="step", ylabel=f"{label}, mean over layers")
            axes.set_title(optimizer, fontsize=9, loc="left")
            axes.legend(frameon=False, fontsize=8)
            _tidy(axes)
    return figure


def scaling(found: dict[tuple[str, str], list[tuple[float, float, float]]]) -> Figure:
    """By (method, optimizer): (multiplier, change of the logits, interaction), sorted by multiplier."""
    figure = _figure(8.5, 3.4)
    change, interaction = figure.subplots(1, 2)
    for (method, optimizer), points in found.items():
        multiplier, changed, mixed = zip(*points)
        what = "η" if method.startswith("ALLoRA") else "α"
        style = {"color": COLORS.get(method, _OTHER), "linestyle": "-" if optimizer == "adamw" else "--", "marker": "o"}
        change.plot(multiplier, changed, label=f"{method}'s {what}, {optimizer}", **style)
        interaction.plot(multiplier, mixed, **style)
    for axes, label in (
        (change, "change of the logits (relative)"),
        (interaction, "part that the halves do not add up to"),
    ):
        axes.set(xscale="log", xlabel="multiplier of α or η in training", ylabel=label, ylim=(0, None))
        ticks = sorted({m for points in found.values() for m, _, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _tidy(axes)
    change.legend(frameon=False, fontsize=7)
    return figure
