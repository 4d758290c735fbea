"""What each provider of a section of steps must cost over the floor, counted from its passes as `budget` does for one layer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import adapter_passes, adapters, expert_passes, experts, quantized, quantized_passes
from .measured import NOT_MEASURED, ratio
from .passes import Pass
from .steps import StepCase


class Counted(NamedTuple):
    """A section: its cases, the providers that are counted, the floor first, and the passes of one at a case."""

    section: str
    cases: Sequence[StepCase]
    providers: tuple[str, ...]
    passes: Callable[[str, Any], list[Pass]]


EXPERTS = Counted("experts", experts.GPU_CASES, expert_passes.COUNTED, expert_passes.expert_passes)
ADAPTERS = Counted("adapters", adapters.GPU_CASES, adapter_passes.COUNTED, adapter_passes.adapter_passes)
QUANTIZED = Counted("quantized", quantized.GPU_CASES, quantized_passes.COUNTED, quantized_passes.quantized_passes)
ALL = (EXPERTS, ADAPTERS, QUANTIZED)
HEADINGS = ["", "step, µs", "over the floor", "measured"]


def predicted_ms(counted: Counted, name: str, case: StepCase, tflops: float, tb_per_s: float) -> float:
    """Milliseconds of forward and backward by the count."""
    return 1e3 * sum(p.seconds(tflops * 1e12, tb_per_s * 1e12) for p in counted.passes(name, case))


def rows(
    counted: Counted, tflops: float, tb_per_s: float, results: Sequence[dict]
) -> Iterator[tuple[StepCase, list[list[str]]]]:
    """Each case and the cells of its table: name, predicted step and its ratio to the floor's, and the ratio measured in the
    first of `results` that has it."""
    floor_name = counted.providers[0]
    for case in counted.cases:
        floor, table = predicted_ms(counted, floor_name, case, tflops, tb_per_s), []
        for name in counted.providers:
            time = predicted_ms(counted, name, case, tflops, tb_per_s)
            found = (ratio(data, case, name, "step", floor_name, counted.section) for data in results)
            measured = next((f"{r:.3f}" for r in found if r is not None), NOT_MEASURED)
            table.append([name, f"{1e3 * time:,.0f}", f"{time / floor:.3f}", measured])
        yield case, table


def show(console: Console, counted: Counted, tflops: float, tb_per_s: float, results: Sequence[dict]) -> None:
    """Print the budget of every case, marked as computed."""
    for case, table_rows in rows(counted, tflops, tb_per_s, results):
        title = f"computed for {tflops:g} TFLOP/s and {tb_per_s:g} TB/s, forward and backward: {case}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left")
        for cells in table_rows:
            table.add_row(*cells)
        console.print(table)
