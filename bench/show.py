"""Results as tables on a terminal."""

from rich.console import Console
from rich.table import Table


def record(console: Console, section: str, title: str, rows: dict[str, dict]) -> None:
    """Print the rows of one record."""
    table = Table(title=f"{section}: {title}", title_justify="left", header_style="bold")
    table.add_column("provider")
    columns = _COLUMNS[section]
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    floor = rows.get(_FLOORS.get(section, "frozen"), {})
    for name, row in rows.items():
        if row["status"] == "ok":
            table.add_row(name, *(cell(row, floor) for _, cell in columns))
        else:
            table.add_row(name, row["status"], *[""] * (len(columns) - 1))
    console.print(table)
    for name, row in rows.items():
        if row["status"] != "ok":
            console.print(f"  {name}: {row['status']}: {row['reason']}", highlight=False, markup=False)


def time_and_ratio(row: dict, floor: dict, kind: str) -> str:
    """``"1.234 ms ±3% = 1.08x"``: median, half the spread between the 20th and 80th percentile, ratio to the floor."""
    timing = row.get(kind)
    if timing is None:
        return ""
    spread = (timing["p80_ms"] - timing["p20_ms"]) / 2 / timing["median_ms"]
    text = f"{timing['median_ms']:.4g} ms ±{spread:.0%}"
    least = floor.get(kind)
    return f"{text} = {timing['median_ms'] / least['median_ms']:.2f}x" if least else text


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


_TIMES = [
    ("forward", lambda row, frozen: time_and_ratio(row, frozen, "forward")),
    ("forward + backward", lambda row, frozen: time_and_ratio(row, frozen, "forward_backward")),
]


def _step(heading: str) -> list:
    return [
        (heading, lambda row, floor: time_and_ratio(row, floor, "step")),
        ("peak memory", lambda row, floor: _bytes(row.get("step_peak_bytes"))),
    ]


# The provider that the others are compared with, where it is not the frozen layer.
_FLOORS = {"per-sample": "plain"}
# By section: a heading, and the cell of a provider's row beside the floor's.
_COLUMNS = {
    "layer": [*_TIMES, ("peak memory", lambda row, frozen: _bytes(row.get("forward_backward_peak_bytes")))],
    "dispatch": _TIMES,
    "launches": [
        ("kernels, forward", lambda row, frozen: str(row.get("forward_launches", ""))),
        ("forward + backward", lambda row, frozen: str(row.get("forward_backward_launches", ""))),
    ],
    "ways": [
        ("time", lambda row, frozen: time_and_ratio(row, frozen, "time")),
        ("picked", lambda row, frozen: "picked" if row["picked"] else ""),
    ],
    "per-sample": _step("clipped step"),
    "experts": _step("forward + backward"),
    "adapters": _step("forward + backward"),
    "quantized": _step("forward + backward"),
    "model": [
        ("step", lambda row, frozen: time_and_ratio(row, frozen, "step")),
        ("tokens/s", lambda row, frozen: f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""),
        ("peak memory", lambda row, frozen: _bytes(row.get("peak_bytes"))),
    ],
}
