"""The section "ways": every plan of y and of dX beside the frozen GEMM, and how near the best the one that is picked comes."""

import functools
from collections.abc import Iterator
from dataclasses import asdict

from allora_kernels.layer.backend import TRITON_INSTALLED
from allora_kernels.tools.timing import interleaved

from . import cases
from .cases import Case
from .layer import as_row, failure
from .runner import Run


def grid() -> list[Case]:
    """The targets, small M, narrow and long layers, a larger rank."""
    more = [(512, 4096, 4096, 16), (8192, 1024, 4096, 16), (512, 1024, 4096, 16), (8192, 4096, 14336, 16)]
    return [*cases.TARGETS.values(), *(Case(*sizes) for sizes in more), cases.ONE_RANK_MORE]


def run_ways(run: Run) -> None:
    """Device time of every plan, on a GPU with Triton: elsewhere there is one way only."""
    if not run.on_gpu or not TRITON_INSTALLED:
        return
    chosen = cases.matching(grid(), run.shapes)
    for position, case in enumerate(chosen):
        if run.time_is_up():
            run.leave("ways", [(asdict(rest), ["frozen"]) for rest in chosen[position:]])
            return
        steps = {step: asdict(case) | {"product": step} for step in ("y", "dx")}
        if run.only_missing and all(run.results.has("ways", named, ["frozen"]) for named in steps.values()):
            continue
        for step, rows in _measure(run, case):
            run.record("ways", f"{step} of {case}", steps[step], rows)
    run.leave("ways", [])


def _measure(run: Run, case: Case) -> Iterator[tuple[str, dict[str, dict]]]:
    from allora_kernels.tools.tune import plans_of, products
    from csrc_triton import describable, plans

    for product in products(case.inputs(run.device)):
        try:
            options, rejected = plans_of(product, untried=True)
            picked = plans.pick(product.call, run.device, describable(*product.operands[:2], product.operands[4]))
            calls = {name: functools.partial(product.launch, plan) for name, plan in options.items()}
            timings = interleaved(
                {"frozen": product.frozen, **calls}, rounds=run.rounds, device=run.device, budget_s=run.case_budget_s
            )
            rows = {
                name: {"status": "ok", "time": as_row(timing), "picked": name == str(picked)}
                for name, timing in timings.items()
            }
            rows |= {name: {"status": "wrong", "reason": why} for name, why in rejected.items()}
        except Exception as error:
            rows = {"frozen": failure(error)}
        yield product.step, rows
