"""The Triton kernels of the ALLoRA layer and their launchers. Needs torch and triton only; knows no autograd."""

import torch

from . import configs
from .adapter_grad import adapter_grads
from .combine import combine
from .down_project import down_project
from .fused_linear import fused_linear
from .low_rank_add import low_rank_add
from .norms import squared_norms
from .row_norms import token_coefficient, weight_coefficient
from .sample_grad import sample_grads, sample_squared_norms
from .segments import Segments
from .sweep_plan import plan_sweep, sums_over_columns

__all__ = [
    "Segments",
    "adapter_grads",
    "combine",
    "down_project",
    "fused_linear",
    "low_rank_add",
    "plan_steps",
    "sample_grads",
    "sample_squared_norms",
    "squared_norms",
    "token_coefficient",
    "weight_coefficient",
]


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
    """What runs each step of one forward and backward pass: kernel and configuration, by step name."""
    arch = configs.arch_of(device)
    M, N, K = rows, out_features, in_features

    def plan(op, n, k):
        return f"Triton on {arch}, {configs.pick_config(op, M, n, k, r, dtype, arch, compute)}"

    def plan_sweep_step(length, norm, sums):
        sweep = plan_sweep(max(M, 1), length, r, norm, sums, True, dtype, compute, arch)
        note = ", dS by a pass of its own" if sweep.separate else ""
        return f"Triton on {arch}, {sweep.config}{note}"

    steps = {
        "down_project": plan("down_project", 0, K),
        "fused_linear (y)": plan("fused_linear", N, K),
        "fused_linear (dx)": plan("fused_linear", K, N),
        "adapter_grads (sweep over g)": plan_sweep_step(N, norm, sums_over_columns(norm, True, True)),
        "adapter_grads (sweep over x)": plan_sweep_step(K, None, 0),
    }
    if norm in ("row", "matrix", "factor"):
        steps["weight_coefficient"] = f"Triton on {arch}, once per optimizer step"
    elif norm == "token":
        steps["token_coefficient"] = f"Triton on {arch}"
    return steps
