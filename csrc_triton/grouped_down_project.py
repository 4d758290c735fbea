"""``S = x Aᵀ`` with another A for every group of rows: one pass over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_invariance, configs
from .configs import cdiv
from .groups import block_of, group_tile, most_tiles, rows_at
from .launching import launch
from .tiling import TRITON_DTYPE, dot, dot_precision, narrow, offsets


@triton.jit(do_not_specialize=["M"])
def _grouped_down_project_kernel(
    x_ptr,
    a_ptr,
    ends_ptr,
    order_ptr,
    s_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``s[m] = x[m] A_eᵀ`` for m in group e, x [M, K], A [E, R, K], contiguous s [M, R]; zeros where m is in no group. With
    an order s[m] is of x's row order[m].

    One program writes one [BLOCK_M, BLOCK_R] tile of one group; accumulates in fp32.
    """
    group, start, stop = group_tile(tl.program_id(0), ends_ptr, M, BLOCK_M, GROUPS, BLOCK_E)
    if start >= stop:
        return
    offs_m = offsets(start, BLOCK_M)
    offs_r = offsets(tl.program_id(1) * BLOCK_R, BLOCK_R)
    mask_m = offs_m < stop
    mask_r = offs_r < R
    offs_k = offsets(0, BLOCK_K)
    rows = rows_at(order_ptr, offs_m, mask_m, HAS_ORDER)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + group.to(tl.int64) * stride_ae + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, tl.where(group < GROUPS, K, 0), BLOCK_K):
        mask_k = (k + tl.arange(0, BLOCK_K)) < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = dot(x, a, acc, DTYPE, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_r[None, :])


def grouped_down_project(x: Tensor, a: Tensor, ends: Tensor, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """``S = x A_eᵀ [M, R]`` in `dtype` (fp32, fp16 or bf16), for x [M, K] and a [E, R, K] of any strides, ends [E] (int32).

    With `order` [M] (int32) row m of S is that of x's row order[m].
    """
    (M, K), (E, R, _) = x.shape, a.shape
    s = torch.empty(M, R, device=x.device, dtype=dtype)
    if M == 0:
        return s
    config = configs.pick_config(
        "down_project", batch_invariance.planned_rows(M), 0, K, R, x.dtype, configs.arch_of(x.device), dtype
    )
    launch(
        _grouped_down_project_kernel,
        (most_tiles(M, E, config.BLOCK_M), cdiv(R, config.BLOCK_R)),
        x,
        a,
        ends,
        order,
        s,
        M,
        K,
        R,
        *x.stride(),
        *a.stride(),
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=dot_precision(dtype, x.dtype, dtype),
        HAS_ORDER=order is not None,
        GROUPS=E,
        BLOCK_E=block_of(E),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return s
