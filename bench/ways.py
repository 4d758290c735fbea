"""The section "ways": every plan of y and of dX, both places of C, and those of dS, beside the frozen GEMM; how near the best
what is picked comes."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from allora_kernels import reference
from allora_kernels.layer.backend import TRITON_INSTALLED
from allora_kernels.testing import Inputs
from allora_kernels.tools.timing import interleaved
from allora_kernels.tools.tune import Product, plans_of, products, rejected

from . import cases
from .cases import Case
from .layer import as_row, failure
from .providers import ETA
from .runner import Run

WITH_C = "y with C"
"""The product y together with the coefficient of the rule "row", by one call, which may hide C beside the GEMM, or by two."""

BACKWARD = "backward"
"""All three gradients by one call; what it may choose is who finds dS and u."""

STEPS = ("y", "dx", WITH_C, BACKWARD)


def grid() -> list[Case]:
    """The targets, small M, narrow and long layers, a larger rank, fp32 factors."""
    more = [(512, 4096, 4096, 16), (8192, 1024, 4096, 16), (512, 1024, 4096, 16), (8192, 4096, 14336, 16)]
    with_fp32 = replace(cases.TARGETS["M=8192, 4096x4096"], adapter_dtype="float32")
    return [*cases.TARGETS.values(), *(Case(*sizes) for sizes in more), cases.ONE_RANK_MORE, with_fp32]


def run_ways(run: Run) -> None:
    """Device time of every plan, on a GPU with Triton: elsewhere there is one way only."""
    if not run.on_gpu or not TRITON_INSTALLED:
        return
    chosen = cases.matching(grid(), run.shapes)
    for position, case in enumerate(chosen):
        if run.time_is_up():
            run.leave("ways", [(asdict(rest), ["frozen"]) for rest in chosen[position:]])
            return
        steps = {step: asdict(case) | {"product": step} for step in STEPS}
        if run.only_missing and all(run.results.has("ways", named, ["frozen"]) for named in steps.values()):
            continue
        for step, rows in _measure(run, case):
            run.record("ways", f"{step} of {case}", steps[step], rows)
    run.leave("ways", [])


def _measure(run: Run, case: Case) -> Iterator[tuple[str, dict[str, dict]]]:
    inputs = case.inputs(run.device)
    for product in products(inputs):
        yield product.step, _rows(run, product, _plans)
    yield WITH_C, _rows(run, _with_c(inputs), _places_of_c)
    yield BACKWARD, _rows(run, _backward(inputs), _places_of_ds)


def _plans(product: Product) -> tuple[dict[str, Any], str]:
    """Every plan, by its words, and which is picked."""
    from csrc_triton import describable, plans

    x, weight, *_, b = product.operands
    return plans_of(product, untried=True), str(plans.pick(product.call, x.device, describable(x, weight, b)))


def _places_of_c(product: Product) -> tuple[dict[str, Callable], str]:
    """The launchers that find y, S and C, and which is picked."""
    import csrc_triton

    def by_itself(x, weight, bias, a, b, dtype, eta):
        return *csrc_triton.adapted_linear(x, weight, bias, a, b, dtype), csrc_triton.weight_coefficient(
            a, b, eta, "row"
        )

    names = ("C on the way forward", "C by itself")
    x, _, _, a, b = product.operands
    picked = names[0] if csrc_triton.hides_c(x, a, b) else names[1]
    return dict(zip(names, (csrc_triton.adapted_linear_and_coefficient, by_itself))), picked


def _with_c(inputs: Inputs) -> Product:
    y = next(products(inputs))
    *operands, _ = inputs

    def formula(x, weight, bias, a, b):
        return *y.formula(x, weight, bias, a, b), reference.weight_coefficient(a, b, ETA, "row")

    return replace(
        y,
        step=WITH_C,
        launch=lambda launcher: launcher(*operands, y.call.low_rank_dtype, ETA),
        formula=formula,
    )


def _places_of_ds(product: Product) -> tuple[dict[str, Any], str]:
    """The plans of the backward pass, by who finds dS and u in them, and which is picked."""
    import csrc_triton
    from csrc_triton import configs, plans

    g, _, _, weight, a, _ = product.operands
    reach, arch = csrc_triton.describable(g, weight.mT, a.mT), configs.arch_of(g.device)
    picked = "dS and u by a pass of their own"
    columns = [plan for plan in plans.options(product.call, arch, reach, untried=True) if plan.way == "column"]
    return {picked: plans.pick(product.call, g.device, reach), **{str(plan): plan for plan in columns}}, picked


def _backward(inputs: Inputs) -> Product:
    import csrc_triton
    from csrc_triton.plans import Call

    x, weight, _, a, b, g = inputs
    (M, K), N, R = x.shape, len(weight), len(a)
    compute = torch.promote_types(x.dtype, a.dtype)
    s, c = reference.down_project(x, a, compute), reference.weight_coefficient(a, b, ETA, "row")

    return Product(
        BACKWARD,
        Call("layer_grads", M, K, N, R, x.dtype, compute),
        lambda plan: csrc_triton.layer_grads(g, x, s, weight, a, b, ETA, "row", a.dtype, b.dtype, c, plan),
        lambda: g @ weight,
        functools.partial(reference.layer_grads, eta=ETA, norm="row"),
        (g, x, s, weight, a, b),
    )


def _rows(run: Run, product: Product, choices: Callable[[Product], tuple[dict[str, Any], str]]) -> dict[str, dict]:
    """The frozen product's time and that of every choice, or why it has none."""
    try:
        options, picked = choices(product)
        wrong = rejected(product, options)
        calls = {
            name: functools.partial(product.launch, option) for name, option in options.items() if name not in wrong
        }
        timings = interleaved(
            {"frozen": product.frozen, **calls}, rounds=run.rounds, device=run.device, budget_s=run.case_budget_s
        )
    except Exception as error:
        return {"frozen": failure(error)}
    rows = {
        name: {"status": "ok", "time": as_row(timing), "picked": name == picked} for name, timing in timings.items()
    }
    return rows | {name: {"status": "wrong", "reason": why} for name, why in wrong.items()}
