"""The forward pass: ``S = x Aᵀ`` and ``y = x Wᵀ + bias + S Bᵀ``, in one launch or in two; for training with C, beside them."""

import torch
from torch import Tensor

from . import configs, plans
from .chain import chained
from .down_project import down_project, down_project_beside
from .fused_linear import fused_linear, launch_persistently, launch_tiles
from .fused_linear_persistent import describable
from .row_norms import weight_coefficient


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
    y, s, _ = _adapted_linear(x, weight, bias, a, b, dtype, None, plan)
    return y, s


def adapted_linear_and_coefficient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    eta: float,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`adapted_linear`, and C [N] (fp32) of the rule "row" for the backward pass, which finds room beside the GEMM here."""
    return _adapted_linear(x, weight, bias, a, b, dtype, eta, plan)


def _adapted_linear(x, weight, bias, a, b, dtype, eta, plan):
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    if M and plan is None:
        call = plans.Call("adapted_linear", M, N, K, R, x.dtype, dtype)
        plan = plans.pick(call, x.device, describable(x, weight, b))
    beside = None
    if M and plan.way in plans.PERSISTENT and configs.can_overlap(x.device):
        beside = configs.beside(K, R, x.dtype, configs.arch_of(x.device), dtype)
    if beside is not None:
        # Before C's scratch, which is given back within the chain.
        y = torch.empty(M, N, device=x.device, dtype=x.dtype)
        # C of fp32 factors takes more registers than there are beside the GEMM.
        c_beside = eta is not None and b.itemsize == 2 and a.itemsize == 2
        c = None if eta is None or c_beside else weight_coefficient(a, b, eta, "row")
        places = ("late", "open") * c_beside + ("open",) * plans.takes_parts(plan.way, x.dtype, dtype) + ("midway",)
        # S first: of its programs each multiprocessor gets one, where C's stood some would get two, and the GEMM find no room.
        with chained(True, *places):
            s = down_project_beside(x, a, dtype, beside)
            if c_beside:
                c = weight_coefficient(a, b, eta, "row")
            launch_persistently(x, weight, bias, s, b, y, plan, beside=True)
        return y, s, c
    c = None if eta is None else weight_coefficient(a, b, eta, "row")
    if M and plan.way == "inside":
        s = torch.empty(M, R, device=x.device, dtype=dtype)
        return launch_tiles(x, weight, bias, a, s, b, plan.config), s, c
    s = down_project(x, a, dtype)
    return fused_linear(x, weight, bias, s, b, plan), s, c
