"""A `torch.library` op for each launcher of csrc_triton, so that torch.compile sees them as single nodes.

Each op's fake says only what comes out: shapes and dtypes, always contiguous. The formulas are in `reference`, under
the same names.
"""

import torch
from torch import Tensor

import csrc_triton


@torch.library.custom_op("allora::down_project", mutates_args=())
def down_project(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``S = x Aᵀ [M, R]`` in `dtype`, for x [M, K] and a [R, K]."""
    return csrc_triton.down_project(x, a, dtype)


@down_project.register_fake
def _(x, a, dtype):
    return x.new_empty(x.shape[0], a.shape[0], dtype=dtype)


@torch.library.custom_op("allora::fused_linear", mutates_args=())
def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    """``y = x Wᵀ + bias + S Bᵀ [M, N]`` in x's dtype."""
    return csrc_triton.fused_linear(x, weight, bias, s, b)


@fused_linear.register_fake
def _(x, weight, bias, s, b):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("allora::low_rank_add", mutates_args={"y"})
def low_rank_add(y: Tensor, s: Tensor, b: Tensor) -> None:
    """``y += S Bᵀ`` in place, for y [M, N]."""
    csrc_triton.low_rank_add(y, s, b)


@low_rank_add.register_fake
def _(y, s, b):
    return None


@torch.library.custom_op("allora::weight_coefficient", mutates_args=())
def weight_coefficient(a: Tensor, b: Tensor, eta: float, norm: str) -> Tensor:
    """C of a weight-dependent rule in fp32: [N] for "row", [1] for "matrix", [N + R] for "factor"."""
    return csrc_triton.weight_coefficient(a, b, eta, norm)


@weight_coefficient.register_fake
def _(a, b, eta, norm):
    size = {"row": b.shape[0], "matrix": 1, "factor": b.shape[0] + b.shape[1]}[norm]
    return a.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("allora::adapter_grads", mutates_args=())
def adapter_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dS [M, R], dA [R, K], dB [N, R]); what is not needed comes back empty."""
    return csrc_triton.adapter_grads(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b)


@adapter_grads.register_fake
def _(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b):
    ds = s.new_empty((g.shape[0], s.shape[1]) if need_ds else (0,))
    da = s.new_empty(0) if dtype_a is None else s.new_empty(s.shape[1], x.shape[1], dtype=dtype_a)
    db = s.new_empty(0) if dtype_b is None else s.new_empty(b.shape[0], s.shape[1], dtype=dtype_b)
    return ds, da, db


from . import vmap_rules  # noqa: E402, F401  the ops it names are defined above
