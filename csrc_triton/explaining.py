"""What a call would run, in words, by the choices that the launchers make."""

import torch

from . import batch_invariance, configs, plans
from .adapted_linear import C_FROM
from .beside import room
from .layer_grads import pick_apart, room_for_ds
from .sweep_plan import plan_sweep, sums_over_columns


def plan_steps(
    rows: int,
    out_features: int,
    in_features: int,
    r: int,
    norm: str | None,
    dtype: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """What runs each step of one forward and backward pass: kernel and configuration, by step name. Of no rows, as of one."""
    arch = configs.arch_of(device)
    M, N, K = max(rows, 1), out_features, in_features

    def aligned(n, k):
        return plans.EVERYTHING if dtype.itemsize == 2 and n % 8 == 0 and k % 8 == 0 else plans.NOTHING

    def way(op, n, k):
        return plans.pick(plans.Call(op, M, n, k, r, dtype, compute), device, aligned(n, k))

    def invariance_cost(op, n, k):
        call = plans.Call(op, M, n, k, r, dtype, compute)
        best = plans.pick_by_cost(call, device, aligned(n, k))
        return plans.estimate(call, plans.pick(call, device, plans.NOTHING), arch) / plans.estimate(call, best, arch)

    def describe(plan):
        note = ", S and B written as bf16 parts in front of it" if plans.takes_parts(plan.way, dtype, compute) else ""
        return str(plan) if plan.config is None else f"Triton on {arch}: {plan}{note}"

    pair = pick_apart(N, K, r, norm, dtype, arch, compute)
    forward, backward = way("adapted_linear", N, K), way("fused_linear" if pair is None else "layer_grads", K, N)
    beside = room(forward, M, K, r, dtype, compute, device)
    steps = {}
    if beside is not None:
        steps["down_project"] = f"Triton on {arch}, {beside.config}, beside the GEMM for y"
    elif forward.way != "inside":
        steps["down_project"] = _config("down_project", M, 0, K, r, dtype, compute, arch)
    steps |= {"adapted_linear (y)": describe(forward), "fused_linear (dx)": describe(backward)}
    if pair is None:
        steps |= _plan_gradients(M, N, K, r, norm, dtype, compute, arch)
    else:
        overlaps = backward.way in plans.PERSISTENT and configs.can_overlap(device)
        note = ", beside the GEMM for dx"
        of_ds = room_for_ds(backward, M, N, K, r, norm, dtype, compute, device)
        if of_ds is not None:
            steps["down_project (ds)"] = f"Triton on {arch}, {of_ds.config}{note}"
        else:
            steps["down_project (ds)"] = _config("down_project", M, 0, N, r, dtype, compute, arch)
        steps["outer_pair (da, db)"] = f"Triton on {arch}, {pair}{note if overlaps else ''}"
        steps |= _plan_coefficient(norm, arch)
        if norm == "row" and beside is not None:
            where = "" if M * N * K >= C_FROM else ", where the layer is compiled"
            steps["weight_coefficient"] += f", of 16-bit factors beside the GEMM for y{where}"
    if batch_invariance.enabled():
        y, dx = invariance_cost("adapted_linear", N, K), invariance_cost("fused_linear", K, N)
        steps["batch invariance"] = (
            f"on: y {y:.2f} and dx {dx:.2f} times as long by estimate, and one more pass over g for dS"
        )
    return steps


def plan_added_steps(
    rows: int,
    out_features: int,
    in_features: int,
    r: int,
    norm: str | None,
    dtype: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """`plan_steps` where another layer computes y and dX and the adapter is added to them."""
    arch = configs.arch_of(device)
    M, N, K = max(rows, 1), out_features, in_features
    return {
        "down_project": _config("down_project", M, 0, K, r, dtype, compute, arch),
        "low_rank_add (y)": _config("low_rank_add", M, N, 0, r, dtype, compute, arch),
        **_plan_gradients(M, N, K, r, norm, dtype, compute, arch),
        "low_rank_add (dx)": _config("low_rank_add", M, K, 0, r, dtype, compute, arch),
    }


def _config(op: str, M: int, n: int, k: int, r: int, dtype: torch.dtype, compute: torch.dtype, arch: str) -> str:
    return f"Triton on {arch}, {configs.pick_config(op, M, n, k, r, dtype, arch, compute)}"


def _plan_gradients(
    M: int, N: int, K: int, r: int, norm: str | None, dtype: torch.dtype, compute: torch.dtype, arch: str
) -> dict[str, str]:
    def plan_sweep_step(length, norm, sums):
        sweep = plan_sweep(M, length, r, norm, sums, True, dtype, compute, arch)
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
    if norm in ("row", "matrix", "factor"):
        return {"weight_coefficient": f"Triton on {arch}, once a step"}
    return {"token_coefficient": f"Triton on {arch}"} if norm == "token" else {}
