"""``y = x W_eᵀ + bias_e + S B_eᵀ`` for groups of rows: one GEMM, every group's low-rank product as its epilogue; or, where all
groups share a weight, the vendor's GEMM added to these products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_invariance, configs, plans
from .configs import cdiv
from .grouped_low_rank_product import grouped_low_rank_product
from .groups import block_of, group_strides, group_tile, most_tiles, rows_at
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, dot, dot_precision, grouped_tile, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M", "TILES_M"])
def _grouped_fused_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    ends_ptr,
    order_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_bias_e,
    stride_bias,
    stride_sm,
    stride_sr,
    stride_be,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    TILES_M,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y[m] = x[m] W_eᵀ + bias_e + S[m] B_eᵀ`` for m in group e; zeros where m is in no group, but
    ``x[m] Wᵀ + bias`` where W and bias are SHARED by all rows. With an order x and y are indexed by order[m].

    x [M, K], W [E, N, K], bias [E, N], S [M, R], B [E, N, R], y [M, N]. One program writes one [BLOCK_M, BLOCK_N] tile of one
    group, or none: TILES_M is the most tiles that M rows can have. Accumulates in fp32, rounds once.
    """
    R, stride_sm, stride_bn = in_steps(R, S_STEP), in_steps(stride_sm, S_STEP), in_steps(stride_bn, B_STEP)
    pid_m, pid_n = grouped_tile(tl.program_id(0), TILES_M, tl.cdiv(N, BLOCK_N), GROUP_M)
    group, start, stop = group_tile(pid_m, ends_ptr, M, BLOCK_M, GROUPS, BLOCK_E)
    if start >= stop:
        return
    adapted = group < GROUPS
    real = adapted | SHARED
    e = group.to(tl.int64)
    offs_m = offsets(start, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < stop
    mask_n = offs_n < N
    offs_k = offsets(0, BLOCK_K)
    rows = rows_at(order_ptr, offs_m, mask_m, HAS_ORDER)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + e * stride_we + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.where(real, K, 0), BLOCK_K):
        mask_x, mask_w = mask_m[:, None], mask_n[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < K
            mask_x, mask_w = mask_x & mask_k[None, :], mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc, DTYPE, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    acc = add_low_rank(
        acc,
        (s_ptr, stride_sm, stride_sr),
        (b_ptr + e * stride_be, stride_bn, stride_br),
        offs_m,
        offs_n,
        mask_m & adapted,
        mask_n & adapted,
        R,
        LOW_RANK_DTYPE,
        LOW_RANK_PRECISION,
        BLOCK_R,
    )
    if HAS_BIAS:
        bias_ptrs = bias_ptr + e * stride_bias_e + offs_n * stride_bias
        acc += tl.load(bias_ptrs, mask=mask_n & real, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])


def grouped_fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    ends: Tensor,
    order: Tensor | None = None,
    by_vendor: bool | None = None,
) -> Tensor:
    """``y = x W_eᵀ + bias_e + S B_eᵀ [M, N]`` in x's dtype; ``(g, Wᵀ, None, ds, Aᵀ, ends)`` gives ``dX = g W_e + dS A_e``.

    x [M, K] and weight [E, N, K] share a dtype; s [M, R] sets the one of the low-rank product; b [E, N, R], bias [E, N], any
    strides; ends [E] (int32). A weight [N, K] and a bias [N] are those of every row, also of those in no group.

    With `order` [M] (int32) row m of s is that of row order[m] of x and y. `by_vendor`, for a weight [N, K], is chosen where it
    is None.
    """
    (M, K), (E, N, R) = x.shape, b.shape
    if M and weight.dim() == 2:
        if by_vendor is None:
            by_vendor = plans.by_vendor_for_groups(plans.Call("fused_linear", M, N, K, R, x.dtype, s.dtype), x.device)
        if by_vendor:
            # As in `fused_linear`: what it adds to is read while its matrix units work.
            return grouped_low_rank_product(s, b, bias, ends, order, x.dtype).addmm_(x, weight.mT)
    y = torch.empty(M, N, device=x.device, dtype=x.dtype)
    if M == 0:
        return y
    config = configs.pick_config(
        "grouped_fused_linear", batch_invariance.planned_rows(M), N, K, R, x.dtype, configs.arch_of(x.device), s.dtype
    )
    tiles_m = most_tiles(M, E, config.BLOCK_M)
    launch(
        _grouped_fused_linear_kernel,
        (tiles_m * cdiv(N, config.BLOCK_N),),
        x,
        weight,
        bias,
        s,
        b,
        ends,
        order,
        y,
        M,
        N,
        K,
        R,
        *x.stride(),
        *group_strides(weight),
        *group_strides(bias, 1),
        *s.stride(),
        *b.stride(),
        *y.stride(),
        tiles_m,
        DTYPE=TRITON_DTYPE[x.dtype],
        PRECISION=dot_precision(x.dtype, x.dtype, x.dtype),
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        LOW_RANK_PRECISION=dot_precision(s.dtype, x.dtype, x.dtype),
        HAS_BIAS=bias is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        HAS_ORDER=order is not None,
        SHARED=weight.dim() == 2,
        GROUPS=E,
        BLOCK_E=block_of(E),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        S_STEP=step_of(R, s.stride(0)),
        B_STEP=step_of(b.stride(-2)),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **configs.all_registers(configs.arch_of(x.device)),
    )
    return y
