"""The plots of one device's results, as PNG files."""

from pathlib import Path

from matplotlib.figure import Figure

from .cases import Case
from .measured import median, records
from .passes import COUNTED, passes, total
from .providers import PROVIDERS

_PALETTE = ("#555555", "#1f4e79", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3", "#b07aa1", "#00798c")
_COLORS = dict(zip(PROVIDERS, _PALETTE))

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


def bf16_records(data: dict) -> list[tuple[Case, dict]]:
    """The newest record of each bf16 case, the most important first."""
    found: dict[Case, dict] = {}
    for record in records(data, "layer"):
        case = Case(**record["case"])
        if case.dtype == case.adapter_dtype == "bfloat16":
            found.setdefault(case, record)
    return sorted(found.items(), key=lambda item: (item[0].R != 16, item[0].R, -item[0].M, item[0].K, item[0].N))


def _layer(data: dict) -> Figure | None:
    shown = bf16_records(data)[:24]
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(shown)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name in PROVIDERS:
        points = [
            (time / floor, position)
            for position, (_, record) in enumerate(shown)
            if (time := median(record, name, "forward_backward"))
            and (floor := median(record, "frozen", "forward_backward"))
        ]
        if points and name != "frozen":
            axes.plot(*zip(*points), "o", color=_COLORS[name], label=name, markersize=8 if name == "ours" else 5)
    axes.axvline(1.0, color=_COLORS["frozen"], linewidth=1)
    axes.set_yticks(range(len(shown)), [str(case).removesuffix(" bfloat16") for case, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time over the frozen layer's (M, KxN, R)")
    return _finish(figure, data, axes)


def _roofline(data: dict) -> Figure | None:
    shown = bf16_records(data)
    ceilings = next((data["runs"][r["run"]].get("ceilings") for _, r in shown), None)
    if not ceilings or "bfloat16" not in ceilings:
        return None
    peak, bandwidth = ceilings["bfloat16"]["tflops"], ceilings["copy"]["bytes_per_s"] * 1e-12
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    reach = [10, peak / bandwidth, 1e4]
    axes.plot(reach, [min(peak, bandwidth * x) for x in reach], color="black", linewidth=1)
    for name in PROVIDERS:
        points = []
        for case, record in shown:
            time = median(record, name, "forward_backward")
            if time and name in COUNTED:
                flops, moved = total(passes(name, case, "forward_backward"))
                points.append((flops / moved, flops / time * 1e-9))
        if points:
            axes.plot(*zip(*points), ".", color=_COLORS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (counted)", ylabel="TFLOP/s, forward + backward")
    return _finish(figure, data, axes)


def _model(data: dict) -> Figure | None:
    shown = [r for r in records(data, "model") if any("tokens_per_s" in row for row in r["providers"].values())]
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
