"""The plots of one device's results, as PNG files."""

from pathlib import Path

from matplotlib.figure import Figure

from .cases import Case
from .measured import median, quoted, ratio, records
from .passes import COUNTED, passes, total
from .providers import PROVIDERS

_COLORS = {
    "frozen": "#555555",
    "ours": "#1f4e79",
    "eager": "#d1495b",
    "compile": "#edae49",
    "eager-gram": "#e8998d",
    "compile-gram": "#a98467",
    "peft": "#66a182",
    "peft-fp32": "#2e4057",
    "peft-autocast": "#7fb7be",
    "peft-dora": "#8d96a3",
    "addmm-in-place": "#b07aa1",
    "epilogue-atomics": "#00798c",
}

TITLES = {
    "layer": "Cost over the frozen layer, forward + backward",
    "roofline": "Roofline",
    "model": "Whole model: tokens/s and peak memory",
}


def draw(data: dict, folder: Path, stem: str) -> dict[str, str]:
    """Write what the results have to `folder`, as ``bench-<stem>-<plot>.png``.

    Returns:
        {file name: what it shows}, in the order to be read.
    """
    drawn = {}
    for (name, title), plot in zip(TITLES.items(), (_layer, _roofline, _model)):
        figure = plot(data)
        if figure is not None:
            file = f"bench-{stem}-{name}.png"
            # No date and no version inside: the same results give the same file.
            figure.savefig(folder / file, format="png", metadata={"Software": None})
            drawn[file] = title
    return drawn


def _bf16_cases(data: dict) -> list[Case]:
    """Each bf16 case that there is a record of, the most important first."""
    found = {Case(**record["case"]) for record in records(data, "layer")}
    bf16 = [case for case in found if case.dtype == case.adapter_dtype == "bfloat16"]
    return sorted(bf16, key=lambda case: (case.R != 16, case.R, -case.M, case.K, case.N))


def _layer(data: dict) -> Figure | None:
    shown = _bf16_cases(data)[:24]
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(shown)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name in PROVIDERS:
        points = [
            (over_frozen, position)
            for position, case in enumerate(shown)
            if (over_frozen := ratio(data, case, name, "forward_backward"))
        ]
        if points and name != "frozen":
            axes.plot(*zip(*points), "o", color=_COLORS[name], label=name, markersize=8 if name == "ours" else 5)
    axes.axvline(1.0, color=_COLORS["frozen"], linewidth=1)
    axes.set_yticks(range(len(shown)), [str(case).removesuffix(" bfloat16") for case in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time over the frozen layer's (M, KxN, R)")
    return _finish(figure, data, axes)


def _roofline(data: dict) -> Figure | None:
    shown = _bf16_cases(data)
    newest = next(records(data, "layer", shown[0]), None) if shown else None
    ceilings = newest and data["runs"][newest["run"]].get("ceilings")
    if not ceilings or "bfloat16" not in ceilings:
        return None
    peak, bandwidth = ceilings["bfloat16"]["tflops"], ceilings["copy"]["bytes_per_s"] * 1e-12
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    reach = [10, peak / bandwidth, 1e4]
    axes.plot(reach, [min(peak, bandwidth * x) for x in reach], color="black", linewidth=1)
    for name in PROVIDERS:
        points = []
        for case in shown:
            record = quoted(records(data, "layer", case), name, "frozen")
            time = median(record, name, "forward_backward") if record else None
            if time and name in COUNTED:
                flops, moved = total(passes(name, case, "forward_backward"))
                points.append((flops / moved, flops / time * 1e-9))
        if points:
            axes.plot(*zip(*points), ".", color=_COLORS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (counted)", ylabel="TFLOP/s, forward + backward")
    return _finish(figure, data, axes)


def _model(data: dict) -> Figure | None:
    """Of each case the newest record alone: tokens/s and memory are compared within one run."""
    shown: list[dict] = []
    for record in records(data, "model"):
        timed = any("tokens_per_s" in row for row in record["providers"].values())
        if timed and record["case"] not in [other["case"] for other in shown]:
            shown.append(record)
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.2 + 1.5 * len(shown)), dpi=130, layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, sharex="col")
    for (speed, memory), record in zip(grid, reversed(shown)):
        rows = {n: row for n, row in record["providers"].items() if row["status"] == "ok" and "tokens_per_s" in row}
        case = record["case"]
        speed.barh(list(rows), [row["tokens_per_s"] for row in rows.values()], color="#1f4e79")
        memory.barh(list(rows), [(row["peak_bytes"] or 0) / 2**30 for row in rows.values()], color="#66a182")
        title = f"{case['layers']} layers, {'with' if case['checkpointing'] else 'without'} checkpointing"
        speed.set_title(f"{title}, {'compiled' if case['compiled'] else 'eager'}", fontsize=9, loc="left")
        for axes in (speed, memory):
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
    grid[-1][0].set_xlabel("tokens/s")
    grid[-1][1].set_xlabel("peak memory, GiB")
    return _finish(figure, data)


def _finish(figure: Figure, data: dict, axes=None) -> Figure:
    if axes is not None:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(data["runs"][-1]["device"], fontsize=10)
    return figure
