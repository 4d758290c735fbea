"""``S = x Aᵀ``: the skinny product, one pass over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_invariance, configs
from .combine import combine
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, dot, dot_precision, narrow, offsets


@triton.jit(do_not_specialize=["M"])
def _down_project_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    SPLIT_K,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``s[p] = x[:, part p] A[:, part p]ᵀ`` for x [M, K], A [R, K], contiguous s [P, M, R], part p = SPLIT_K columns of x.

    One program writes one [BLOCK_M, BLOCK_R] tile of one part; accumulates in fp32.
    """
    offs_m = offsets(tl.program_id(0) * BLOCK_M, BLOCK_M)
    offs_r = offsets(tl.program_id(1) * BLOCK_R, BLOCK_R)
    part = tl.program_id(2)
    mask_m = offs_m < M
    mask_r = offs_r < R
    start = part * SPLIT_K
    stop = min(start + SPLIT_K, K)
    offs_k = offsets(start, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(start, stop, BLOCK_K):
        mask_k = (k + tl.arange(0, BLOCK_K)) < stop
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = dot(x, a, acc, DTYPE, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    s_ptrs = s_ptr + (part.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(s_ptrs, narrow(acc, OUT_DTYPE), mask=mask_m[:, None] & mask_r[None, :])


def down_project(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``S = x Aᵀ [M, R]`` in `dtype` (fp32, fp16 or bf16), for x [M, K] and a [R, K] of any strides."""
    (M, K), R = x.shape, a.shape[0]
    if M == 0:
        return torch.empty(0, R, device=x.device, dtype=dtype)
    arch = configs.arch_of(x.device)
    planned_rows = batch_invariance.planned_rows(M)
    config = configs.pick_config("down_project", planned_rows, 0, K, R, x.dtype, arch, dtype)
    tiles = (cdiv(M, config.BLOCK_M), cdiv(R, config.BLOCK_R))
    # A part shorter than eight steps spends its time in the prologue.
    parts = configs.num_splits(cdiv(planned_rows, config.BLOCK_M) * tiles[1], K, 8 * config.BLOCK_K, arch, waves=1)
    split_k = cdiv(cdiv(K, parts), config.BLOCK_K) * config.BLOCK_K
    parts = cdiv(K, split_k)
    out_dtype = dtype if parts == 1 else torch.float32
    s = torch.empty(parts, M, R, device=x.device, dtype=out_dtype)
    launch(
        _down_project_kernel,
        (*tiles, parts),
        x,
        a,
        s,
        M,
        K,
        R,
        *x.stride(),
        *a.stride(),
        split_k,
        DTYPE=TRITON_DTYPE[dtype],
        OUT_DTYPE=TRITON_DTYPE[out_dtype],
        PRECISION=dot_precision(dtype, x.dtype, dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return s[0] if parts == 1 else combine(s, dtype)
