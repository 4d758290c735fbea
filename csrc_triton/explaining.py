"""What a call would run, in words, by the choices that the launchers make."""

import torch

from . import batch_invariance, configs, plans
from .adapted_linear import C_FROM
from .beside import room
from .layer_grads import pick_apart, room_for_ds
from .row_norms import WEIGHT_NORMS
from .sweep_plan import plan_sweep, sums_over_columns


def plan_steps(call: plans.LayerCall, device: torch.device) -> dict[str, str]:
    """What runs each step of one forward and backward pass of contiguous tensors: kernel and configuration, by step name. Of no
    rows, as of one."""
    arch = configs.arch_of(device)
    call = call._replace(M=max(call.M, 1))
    aligned = call.dtype.itemsize == 2 and call.N % 8 == 0 and call.K % 8 == 0
    describable = plans.EVERYTHING if aligned else plans.NOTHING

    def describe(plan):
        in_parts = plans.takes_parts(plan.way, call.dtype, call.low_rank_dtype)
        note = ", S and B written as bf16 parts in front of it" if in_parts else ""
        return str(plan) if plan.config is None else f"Triton on {arch}: {plan}{note}"

    pair = pick_apart(call, arch)
    forward = plans.pick(call.y, device, describable)
    backward = plans.pick(call.dx._replace(op="fused_linear") if pair is None else call.dx, device, describable)
    beside = room(forward, call.M, call.K, call.R, call.dtype, call.low_rank_dtype, device)
    steps = {}
    if beside is not None:
        steps["down_project"] = f"Triton on {arch}, {beside.config}, beside the GEMM for y"
    elif forward.way != "inside":
        steps["down_project"] = _config("down_project", 0, call.K, call, arch)
    steps |= {"adapted_linear (y)": describe(forward), "fused_linear (dx)": describe(backward)}
    if pair is None:
        steps |= _plan_gradients(call, arch)
    else:
        overlaps = backward.way in plans.PERSISTENT and configs.can_overlap(device)
        note = ", beside the GEMM for dx"
        of_ds = room_for_ds(backward, call, device)
        if of_ds is not None:
            steps["down_project (ds)"] = f"Triton on {arch}, {of_ds.config}{note}"
        else:
            steps["down_project (ds)"] = _config("down_project", 0, call.N, call, arch)
        steps["outer_pair (da, db)"] = f"Triton on {arch}, {pair}{note if overlaps else ''}"
        steps |= _plan_coefficient(call.norm, arch)
        if call.norm == "row" and beside is not None:
            where = "" if call.M * call.N * call.K >= C_FROM else ", where the layer is compiled"
            steps["weight_coefficient"] += f", of 16-bit factors beside the GEMM for y{where}"
    if batch_invariance.enabled():
        products = {"y": call.y, "dx": call.dx._replace(op="fused_linear")}
        times = [f"{name} {_invariance_cost(of, device, describable):.2f}" for name, of in products.items()]
        steps["batch invariance"] = (
            f"on: {' and '.join(times)} times as long by estimate, and one more pass over g for dS"
        )
    return steps


def plan_added_steps(call: plans.LayerCall, device: torch.device) -> dict[str, str]:
    """`plan_steps` where another layer computes y and dX and the adapter is added to them."""
    arch = configs.arch_of(device)
    call = call._replace(M=max(call.M, 1))
    return {
        "down_project": _config("down_project", 0, call.K, call, arch),
        "low_rank_add (y)": _config("low_rank_add", call.N, 0, call, arch),
        **_plan_gradients(call, arch),
        "low_rank_add (dx)": _config("low_rank_add", call.K, 0, call, arch),
    }


def _config(op: str, n: int, k: int, call: plans.LayerCall, arch: str) -> str:
    """The configuration of `op` with outputs of `n` and sums of `k` elements, in words."""
    return f"Triton on {arch}, {configs.pick_config(op, call.M, n, k, call.R, call.dtype, arch, call.low_rank_dtype)}"


def _invariance_cost(product: plans.Call, device: torch.device, describable: int) -> float:
    """How many times as long the product takes under batch invariance."""
    plans_of_it = plans.pick(product, device, plans.NOTHING), plans.pick_by_cost(product, device, describable)
    invariant, best = (plans.estimate(product, plan, configs.arch_of(device)) for plan in plans_of_it)
    return invariant / best


def _plan_gradients(call: plans.LayerCall, arch: str) -> dict[str, str]:
    M, N, K, R, norm, dtype, compute = call

    def plan_sweep_step(length, norm, sums):
        sweep = plan_sweep(M, length, R, norm, sums, True, dtype, compute, arch)
        note = (
            ", dS by a pass of its own" if sweep.separate else ", dB by a sweep of its own" if sweep.outer_apart else ""
        )
        return f"Triton on {arch}, {sweep.config}{note}"

    steps = {
        "adapter_grads (sweep over g)": plan_sweep_step(N, norm, sums_over_columns(norm, True, True)),
        "adapter_grads (sweep over x)": plan_sweep_step(K, None, 0),
    }
    return steps | _plan_coefficient(norm, arch)


def _plan_coefficient(norm: str | None, arch: str) -> dict[str, str]:
    if norm in WEIGHT_NORMS:
        return {"weight_coefficient": f"Triton on {arch}, once a step"}
    return {"token_coefficient": f"Triton on {arch}"} if norm == "token" else {}
