"""The Triton kernels of the ALLoRA layer and their launchers. Needs torch and triton only; knows no autograd."""

import torch

from . import configs
from .adapter_grad import adapter_grads
from .down_project import down_project
from .fused_linear import fused_linear
from .low_rank_add import low_rank_add
from .row_norms import token_coefficient, weight_coefficient

__all__ = [
    "adapter_grads",
    "down_project",
    "fused_linear",
    "low_rank_add",
    "plan_steps",
    "token_coefficient",
    "weight_coefficient",
]


def plan_steps(
    rows: int,
    out_features: int,
    in_features: int,
    r: int,
    dtype: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """What runs each step of one forward and backward pass: kernel and configuration, by step name."""
    arch = configs.arch_of(device)
    M, N, K = rows, out_features, in_features

    def plan(op, n, k, widest):
        return f"Triton on {arch}, {configs.pick_config(op, M, n, k, r, widest, arch)}"

    return {
        "down_project": plan("down_project", 0, K, compute),
        "fused_linear (y)": plan("fused_linear", N, K, dtype),
        "fused_linear (dx)": plan("fused_linear", K, N, dtype),
        "adapter_grads (sweep over g)": plan("sweep", N, 0, compute),
        "adapter_grads (sweep over x)": plan("sweep", K, 0, compute),
        "weight_coefficient": f"Triton on {arch}, once per optimizer step",
    }
