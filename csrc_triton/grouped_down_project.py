"""``S = x Aᵀ`` with another A for every group of rows: one pass over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_invariance, configs
from .configs import cdiv
from .groups import block_of, group_strides, group_tile, most_tiles, rows_at
from .launching import launch
from .tiling import TRITON_DTYPE, dot, dot_precision, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M"])
def _grouped_down_project_kernel(
    x_ptr,
    a_ptr,
    scale_ptr,
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
    stride_scale_e,
    stride_scale,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_STEP: tl.constexpr,
    A_STEP: tl.constexpr,
):
    """``s[m] = x[m] A_eᵀ`` for m in group e, x [M, K], A [E, R, K], contiguous s [M, R]; zeros where m is in no group. With
    an order s[m] is of x's row order[m]; with HAS_SCALE s is [2, M, R], the second of A_e times scale [E, K].

    One program writes one [BLOCK_M, BLOCK_R] tile of one group; accumulates in fp32.
    """
    R, stride_ak = in_steps(R, R_STEP), in_steps(stride_ak, A_STEP)
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
    if HAS_SCALE:
        scaled = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        scale_ptr += group.to(tl.int64) * stride_scale_e
    for k in range(0, tl.where(group < GROUPS, K, 0), BLOCK_K):
        mask_k = (k + tl.arange(0, BLOCK_K)) < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = dot(x, a, acc, DTYPE, PRECISION)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + (k + tl.arange(0, BLOCK_K)) * stride_scale, mask=mask_k, other=0.0)
            scaled = dot(x, a * scale[:, None], scaled, DTYPE, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_r[None, :])
    if HAS_SCALE:
        s_ptrs += tl.full((), M, tl.int64) * R
        tl.store(s_ptrs, narrow(scaled, DTYPE), mask=mask_m[:, None] & mask_r[None, :])


def grouped_down_project(x: Tensor, a: Tensor, ends: Tensor, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """``S = x A_eᵀ [M, R]`` in `dtype` (fp32, fp16 or bf16), for x [M, K] and a [E, R, K] of any strides, ends [E] (int32).

    With `order` [M] (int32) row m of S is that of x's row order[m].
    """
    return _project(x, a, None, ends, dtype, order)[0]


def grouped_down_project_twice(
    x: Tensor, a: Tensor, scale: Tensor, ends: Tensor, dtype: torch.dtype, order: Tensor | None = None
) -> Tensor:
    """``[x A_eᵀ, x (A_e ⊙ scale_e)ᵀ] [2, M, R]`` from one pass over x, for scale [E, K] (fp32); else as the one above."""
    return _project(x, a, scale, ends, dtype, order)


def _project(
    x: Tensor, a: Tensor, scale: Tensor | None, ends: Tensor, dtype: torch.dtype, order: Tensor | None
) -> Tensor:
    (M, K), (E, R, _) = x.shape, a.shape
    s = torch.empty(1 if scale is None else 2, M, R, device=x.device, dtype=dtype)
    if M == 0:
        return s
    op = "down_project" if scale is None else "down_project_twice"
    planned_rows = batch_invariance.planned_rows(M)
    config = configs.pick_config(op, planned_rows, 0, K, R, x.dtype, configs.arch_of(x.device), dtype)
    launch(
        _grouped_down_project_kernel,
        (most_tiles(M, E, config.BLOCK_M), cdiv(R, config.BLOCK_R)),
        x,
        a,
        scale,
        ends,
        order,
        s,
        M,
        K,
        R,
        *x.stride(),
        *a.stride(),
        *group_strides(scale, 1),
        DTYPE=TRITON_DTYPE[dtype],
        PRECISION=dot_precision(dtype, x.dtype, dtype),
        HAS_SCALE=scale is not None,
        HAS_ORDER=order is not None,
        GROUPS=E,
        BLOCK_E=block_of(E),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        R_STEP=step_of(R),
        A_STEP=step_of(a.stride(2)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return s
