"""``bias + S B_eᵀ`` for groups of rows under one weight, for a GEMM of the vendor's to be added to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .groups import block_of, group_tile, most_tiles, rows_at
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, dot_precision, grouped_tile, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M", "TILES_M"])
def _grouped_low_rank_product_kernel(
    y_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    ends_ptr,
    order_ptr,
    M,
    N,
    R,
    stride_bias,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_be,
    stride_bn,
    stride_br,
    TILES_M,
    DTYPE: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y[m] = bias + S[m] B_eᵀ`` for m in group e, the bias alone where m is in no group; with an order y is indexed by
    order[m]. bias [N], S [M, R], B [E, N, R], y [M, N].

    One program writes one [BLOCK_M, BLOCK_N] tile of one group, or none; the sum is taken in fp32 and rounded once.
    """
    R, stride_sm, stride_bn = in_steps(R, S_STEP), in_steps(stride_sm, S_STEP), in_steps(stride_bn, B_STEP)
    pid_m, pid_n = grouped_tile(tl.program_id(0), TILES_M, tl.cdiv(N, BLOCK_N), GROUP_M)
    group, start, stop = group_tile(pid_m, ends_ptr, M, BLOCK_M, GROUPS, BLOCK_E)
    if start >= stop:
        return
    adapted = group < GROUPS
    offs_m = offsets(start, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < stop
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = add_low_rank(
        acc,
        (s_ptr, stride_sm, stride_sr),
        (b_ptr + group.to(tl.int64) * stride_be, stride_bn, stride_br),
        offs_m,
        offs_n,
        mask_m & adapted,
        mask_n & adapted,
        R,
        LOW_RANK_DTYPE,
        PRECISION,
        BLOCK_R,
    )
    rows = rows_at(order_ptr, offs_m, mask_m, HAS_ORDER)
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])


def grouped_low_rank_product(
    s: Tensor, b: Tensor, bias: Tensor | None, ends: Tensor, order: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``bias + S B_eᵀ [M, N]`` in `dtype`, for s [M, R], b [E, N, R] and bias [N] of any strides; ends and order as in
    `grouped_fused_linear`; computed in s's dtype."""
    M, (E, N, R) = s.shape[0], b.shape
    y = torch.empty(M, N, device=s.device, dtype=dtype)
    if M == 0:
        return y
    config = configs.pick_config("low_rank_add", M, N, 0, R, dtype, configs.arch_of(y.device), s.dtype)
    tiles_m = most_tiles(M, E, config.BLOCK_M)
    launch(
        _grouped_low_rank_product_kernel,
        (tiles_m * cdiv(N, config.BLOCK_N),),
        y,
        bias,
        s,
        b,
        ends,
        order,
        M,
        N,
        R,
        0 if bias is None else bias.stride(0),
        *y.stride(),
        *s.stride(),
        *b.stride(),
        tiles_m,
        DTYPE=TRITON_DTYPE[dtype],
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        PRECISION=dot_precision(s.dtype, dtype, dtype),
        HAS_BIAS=bias is not None,
        HAS_ORDER=order is not None,
        GROUPS=E,
        BLOCK_E=block_of(E),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=config.BLOCK_R,
        S_STEP=step_of(R, s.stride(0)),
        B_STEP=step_of(b.stride(-2)),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
