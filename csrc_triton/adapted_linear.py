"""The forward pass: ``S = x Aᵀ`` and ``y = x Wᵀ + bias + S Bᵀ``, in one launch or in two; for training with C, beside them."""

import operator

import torch
from torch import Tensor

from . import batch_invariance, configs, plans
from .beside import counted, room
from .chain import chained, counts
from .down_project import down_project, down_project_beside
from .fused_linear import fused_linear, launch_by_plan, launch_tiles
from .fused_linear_persistent import describable
from .row_norms import row_coefficient_late, weight_coefficient

C_FROM = 2**35
"""Multiplications of the GEMM for y from which C is found beside it in an eager layer (M=2048 at 4096 x 4096): one output more
costs the host some 15 us a step (docs/steps.md), and of a smaller layer the host is what takes long."""


def hides_c(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `adapted_linear_and_coefficient` finds room for C and S beside a persistent GEMM, for x [M, K], a [R, K] and
    b [N, R], and it pays; where y goes another way, C stands in front of it as of the backward pass. No GPU has run C behind
    the GEMM, so that is not asked for."""
    if not (torch.compiler.is_compiling() or x.numel() * b.shape[0] >= C_FROM):
        return False
    R, K = a.shape
    return _leaves_room(operator.index(K), operator.index(R), x.dtype, a.dtype, b.dtype, x.device)


@torch.compiler.assume_constant_result
def _leaves_room(K: int, R: int, dtype: torch.dtype, a: torch.dtype, b: torch.dtype, device: torch.device) -> bool:
    # C's kernels of fp32 factors take more registers.
    if batch_invariance.enabled() or not (configs.can_overlap(device) and a.itemsize == b.itemsize == 2):
        return False
    compute = torch.promote_types(dtype, torch.promote_types(a, b))
    return configs.beside(K, R, dtype, configs.arch_of(device), compute) is not None


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [M, N] in x's dtype, S [M, R] in dtype)`` for x [M, K], weight [N, K], a [R, K] and b [N, R], any strides.

    `plan` is chosen where none is given.
    """
    y, s, _ = adapted_linear_and_coefficient(x, weight, bias, a, b, dtype, None, plan)
    return y, s


def adapted_linear_and_coefficient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    eta: float | None,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`adapted_linear`, and C [N] (fp32) of the rule "row" for the backward pass, None without `eta`: beside a persistent GEMM,
    in front of it if S is there, too, else behind it."""
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    if M and plan is None:
        call = plans.Call("adapted_linear", M, N, K, R, x.dtype, dtype)
        plan = plans.pick(call, x.device, describable(x, weight, b))
    if M and plan.way == "column":
        # Here, as a Triton may have another Gluon (`plans.options`).
        from .adapted_linear_pipelined import adapted_linear_pipelined

        c = None if eta is None else weight_coefficient(a, b, eta, "row")
        return *adapted_linear_pipelined(x, weight, bias, a, b, plan.config), c
    beside = room(plan, M, K, R, x.dtype, dtype, x.device) if M else None
    if beside is not None and beside.rounds > 1:
        beside = counted(beside, x.device)
    if beside is not None:
        # Before C's scratch, which is given back within the chain.
        y = torch.empty(M, N, device=x.device, dtype=x.dtype)
        # S first: of its programs each multiprocessor gets one; where C's stood some would get two, and the GEMM find no room.
        with chained(True, *(("midway",) if eta is None else ("late", "open", "midway"))):
            (s,) = down_project_beside(x, a, None, dtype, beside)
            c = None if eta is None else weight_coefficient(a, b, eta, "row")
            launch_by_plan(x, weight, bias, s, b, y, plan, beside=True, counted=beside.awaited)
        return y, s, c
    if M and eta is not None and _leaves_room_behind(plan, K, R, x.dtype, dtype, x.device):
        under_way = counts(x.device)
        if under_way is not None:
            return _and_coefficient_behind(x, weight, bias, a, b, dtype, eta, plan, under_way)
    c = None if eta is None else weight_coefficient(a, b, eta, "row")
    if M and plan.way == "inside":
        s = torch.empty(M, R, device=x.device, dtype=dtype)
        return launch_tiles(x, weight, bias, a, s, b, plan.config), s, c
    s = down_project(x, a, dtype)
    return fused_linear(x, weight, bias, s, b, plan), s, c


def _leaves_room_behind(
    plan: plans.Plan, K: int, R: int, dtype: torch.dtype, low_rank_dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether C comes behind the GEMM of `plan`: where S has no room beside it, however few its rows."""
    if plan.way not in plans.PERSISTENT or not configs.can_overlap(device):
        return False
    return configs.beside(K, R, dtype, configs.arch_of(device), low_rank_dtype) is None


def _and_coefficient_behind(x, weight, bias, a, b, dtype, eta, plan, under_way):
    """y, S and C, whose kernels come behind the GEMM and take what room it leaves, at the latest where its last tiles leave
    multiprocessors idle."""
    s = down_project(x, a, dtype)
    y = torch.empty(len(x), len(weight), device=x.device, dtype=x.dtype)
    in_parts = plans.takes_parts(plan.way, x.dtype, dtype)
    with chained(True, *("midway",) * in_parts, "late", "late"):
        held = launch_by_plan(x, weight, bias, s, b, y, plan, beside=True)
        c = row_coefficient_late(a, b, eta, under_way)
        del held
    return y, s, c
