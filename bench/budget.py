"""``python -m bench.budget``: what each provider must cost over the frozen layer, counted from its passes; beside it what
was measured, where results exist.

A pass takes the longer of its FLOPs at the device's rate and its bytes at the device's bandwidth; passes add up. Traffic
that stays in the L2 cache, launches, and the host are not counted, so a prediction is a floor for passes that run one after
the other, as those of all providers but this library's: what it runs beside a GEMM is hidden in part, and costs less.
"""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from . import cases, step_budget
from .cases import TARGETS, Case
from .measured import NOT_MEASURED, ratio
from .passes import COUNTED, passes
from .results import all_files

TFLOPS, TERABYTES_PER_S = 800.0, 3.0
"""An H100's bf16 GEMM and memory, as one can hope to reach them."""

KINDS = ("forward", "backward", "forward_backward")


def predicted_ms(name: str, case: Case, kind: str, tflops: float = TFLOPS, tb_per_s: float = TERABYTES_PER_S) -> float:
    """Milliseconds of `kind` by the count."""
    return 1e3 * sum(p.seconds(tflops * 1e12, tb_per_s * 1e12) for p in passes(name, case, kind))


def predicted_ratio(
    name: str, case: Case, kind: str, tflops: float = TFLOPS, tb_per_s: float = TERABYTES_PER_S
) -> float:
    """The predicted cost of `name` over the frozen layer's."""
    return predicted_ms(name, case, kind, tflops, tb_per_s) / predicted_ms("frozen", case, kind, tflops, tb_per_s)


def rows(case: Case, tflops: float, tb_per_s: float, results: Sequence[dict]) -> list[list[str]]:
    """Cells of the table: name, predicted ratios, and the measured forward and forward + backward of the first of
    `results` that has them."""
    table = []
    for name in COUNTED[1:]:
        cells = [f"{predicted_ratio(name, case, kind, tflops, tb_per_s):.3f}" for kind in KINDS]
        for kind in ("forward", "forward_backward"):
            found = [r for r in (ratio(data, case, name, kind) for data in results) if r is not None]
            cells.append(f"{found[0]:.3f}" if found else NOT_MEASURED if name not in _ON_PAPER else "")
        table.append([name, *cells])
    return table


_ON_PAPER = ("the low-rank FLOPs alone", "addmm-in-place, S and dS computed twice")
HEADINGS = ["", "forward", "backward", "both", "measured: forward", "measured: both"]


def show(
    console: Console,
    chosen: Sequence[Case] = tuple(TARGETS.values()),
    tflops: float = TFLOPS,
    tb_per_s: float = TERABYTES_PER_S,
) -> None:
    """Print the budget of each case, marked as computed."""
    results = _of_gpus()
    for case in chosen:
        title = f"computed for {tflops:g} TFLOP/s and {tb_per_s:g} TB/s, cost over the frozen layer: {case}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading else "left")
        for cells in rows(case, tflops, tb_per_s, results):
            table.add_row(*cells)
        console.print(table)


def show_steps(console: Console, tflops: float = TFLOPS, tb_per_s: float = TERABYTES_PER_S) -> None:
    """Print the budgets of the sections of steps, marked as computed."""
    for counted in step_budget.ALL:
        step_budget.show(console, counted, tflops, tb_per_s, _of_gpus())


def _of_gpus() -> list[dict]:
    # A CPU's ratios are no measurement of what is predicted for a GPU.
    return [data for data in map(_read, all_files()) if data["runs"][-1]["device"] != "cpu"]


def _read(file) -> dict:
    return json.loads(file.read_text())


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.budget", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=cases.parse_shape, default=[], metavar="M=..,N=..,K=..,R=..")
    parser.add_argument("--tflops", type=cases.above_zero, default=TFLOPS, help="TFLOP/s of a GEMM (default 800)")
    parser.add_argument(
        "--tb-per-s", type=cases.above_zero, default=TERABYTES_PER_S, help="TB/s of memory (default 3.0)"
    )
    parser.add_argument("--passes", metavar="PROVIDER", choices=COUNTED, help="list the passes of one provider")
    options = parser.parse_args(arguments)
    console = console or Console()
    # The rate is that of 16-bit products.
    grid = [case for case in cases.gpu_grid() if case.dtype == case.adapter_dtype == "bfloat16"]
    chosen = cases.matching(grid, options.shapes) if options.shapes else list(TARGETS.values())
    if not chosen:
        parser.error("no case of the grid has such a shape; one with all of M, N, K and R is a case of its own")
    if options.passes is None:
        show(console, chosen, options.tflops, options.tb_per_s)
        if not options.shapes:
            show_steps(console, options.tflops, options.tb_per_s)
        return 0
    for case in chosen:
        table = Table(title=f"computed: {options.passes}, {case}", title_justify="left", header_style="bold")
        for heading in ("pass", "MB read", "MB written", "GFLOP", "MB in L2", "µs"):
            table.add_column(heading, justify="left" if heading == "pass" else "right")
        for p in passes(options.passes, case, "forward_backward"):
            seconds = p.seconds(options.tflops * 1e12, options.tb_per_s * 1e12)
            numbers = (p.reads / 1e6, p.writes / 1e6, p.flops / 1e9, p.cached / 1e6, seconds * 1e6)
            table.add_row(p.name, *(f"{number:.1f}" for number in numbers))
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
