"""Results as tables on a terminal."""

from rich.console import Console
from rich.table import Table

from . import model, providers

DESCRIPTIONS = {
    "layer": {name: spec.description for name, spec in providers.PROVIDERS.items()},
    "model": model.VARIANTS,
}
DESCRIPTIONS["dispatch"] = DESCRIPTIONS["layer"]


def record(console: Console, section: str, title: str, rows: dict[str, dict]) -> None:
    """Print the rows of one record."""
    table = Table(title=f"{section}: {title}", title_justify="left", header_style="bold")
    table.add_column("provider")
    columns = _MODEL if section == "model" else _LAYER if section == "layer" else _LAYER[:2]
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        if row["status"] == "ok":
            table.add_row(name, *(cell(row, rows.get("frozen", {})) for _, cell in columns))
        else:
            table.add_row(name, row["status"], *[""] * (len(columns) - 1))
    console.print(table)
    for name, row in rows.items():
        if row["status"] != "ok":
            console.print(f"  {name}: {row['status']}: {row['reason']}", highlight=False, markup=False)


def time_and_ratio(row: dict, frozen: dict, kind: str) -> str:
    """``"1.234 ms ±3% = 1.08x"``: median, half the spread between the 20th and 80th percentile, ratio to frozen."""
    timing = row.get(kind)
    if timing is None:
        return ""
    spread = (timing["p80_ms"] - timing["p20_ms"]) / 2 / timing["median_ms"]
    text = f"{timing['median_ms']:.4g} ms ±{spread:.0%}"
    floor = frozen.get(kind)
    return f"{text} = {timing['median_ms'] / floor['median_ms']:.2f}x" if floor else text


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


_LAYER = [
    ("forward", lambda row, frozen: time_and_ratio(row, frozen, "forward")),
    ("forward + backward", lambda row, frozen: time_and_ratio(row, frozen, "forward_backward")),
    ("kernels", lambda row, frozen: str(row.get("forward_backward_launches") or "")),
    ("peak memory", lambda row, frozen: _bytes(row.get("forward_backward_peak_bytes"))),
]
_MODEL = [
    ("step", lambda row, frozen: time_and_ratio(row, frozen, "step")),
    ("tokens/s", lambda row, frozen: f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""),
    ("peak memory", lambda row, frozen: _bytes(row.get("peak_bytes"))),
]
