"""``y = x Wᵀ + bias + S Bᵀ``: one GEMM, the low-rank product as its epilogue. By strides also ``dX = g W + dS A``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiling import TRITON_DTYPE, add_low_rank, dot, dot_precision, grouped_tile, launch, narrow, offsets


@triton.jit(do_not_specialize=["M"])
def _fused_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y = x Wᵀ + bias + S Bᵀ`` for x [M, K], W [N, K], bias [N], S [M, R], B [N, R], y [M, N].

    One program writes one [BLOCK_M, BLOCK_N] tile of y. The low-rank product and the bias are added to the GEMM's fp32
    accumulator, so y is rounded once.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = offsets(pid_m * BLOCK_M, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    offs_k = offsets(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
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
        s_ptr,
        b_ptr,
        offs_m,
        offs_n,
        mask_m,
        mask_n,
        R,
        stride_sm,
        stride_sr,
        stride_bn,
        stride_br,
        LOW_RANK_DTYPE,
        LOW_RANK_PRECISION,
        BLOCK_R,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    """``y = x Wᵀ + bias + S Bᵀ [M, N]`` in x's dtype; ``(g, Wᵀ, None, ds, Aᵀ)`` gives ``dX = g W + dS A``.

    x [M, K] and weight [N, K] share a dtype; s [M, R] sets the one of the low-rank product; any strides.
    """
    (M, K), N, R = x.shape, weight.shape[0], s.shape[1]
    y = torch.empty(M, N, device=x.device, dtype=x.dtype)
    if M == 0:
        return y
    arch = configs.arch_of(x.device)
    config = configs.pick_config("fused_linear", M, N, K, R, x.dtype, arch, s.dtype)
    launch(
        _fused_linear_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),),
        x,
        weight,
        bias,
        s,
        b,
        y,
        M,
        N,
        K,
        R,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *s.stride(),
        *b.stride(),
        *y.stride(),
        DTYPE=TRITON_DTYPE[x.dtype],
        PRECISION=dot_precision(x.dtype, x.dtype, x.dtype),
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        LOW_RANK_PRECISION=dot_precision(s.dtype, x.dtype, x.dtype),
        HAS_BIAS=bias is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
