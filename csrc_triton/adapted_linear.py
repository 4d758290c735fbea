"""The forward pass: ``S = x Aᵀ`` and ``y = x Wᵀ + bias + S Bᵀ``, in one launch or in two."""

import torch
from torch import Tensor

from . import configs, plans
from .chain import chained
from .down_project import down_project, down_project_beside
from .fused_linear import fused_linear, launch_beside, launch_tiles
from .fused_linear_persistent import describable


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
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    if M and plan is None:
        call = plans.Call("adapted_linear", M, N, K, R, x.dtype, dtype)
        plan = plans.pick(call, x.device, describable(x, weight, b))
    if M and plan.way == "inside":
        s = torch.empty(M, R, device=x.device, dtype=dtype)
        return launch_tiles(x, weight, bias, a, s, b, plan.config), s
    if M and plan.way in plans.PERSISTENT and configs.can_overlap(x.device):
        beside = configs.beside(K, R, x.dtype, configs.arch_of(x.device), dtype)
        if beside is not None:
            y = torch.empty(M, N, device=x.device, dtype=x.dtype)
            with chained(True):
                s = down_project_beside(x, a, dtype, beside)
                launch_beside(x, weight, bias, s, b, y, plan, wait="for S")
            return y, s
    s = down_project(x, a, dtype)
    return fused_linear(x, weight, bias, s, b, plan), s
