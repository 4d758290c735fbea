"""fp32 factors as bf16 parts, one after another along the rank: of these a GEMM takes ``S Bᵀ`` like that of any bf16 factors.

``t = th + tm`` for bf16 th and tm, but for a rest below 2^-16 of t, which does not show in a result rounded to bf16. So
``S Bᵀ = Sh Bhᵀ + Sh Bmᵀ + Sm Bhᵀ`` is ``S3 B3ᵀ`` for ``S3 = [Sh | Sh | Sm]`` and ``B3 = [Bh | Bm | Bh]``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import join_chain
from .configs import block_r, cdiv
from .launching import launch
from .tiling import in_steps, narrow, offsets, step_of

_BLOCK_L = 32
"""Rows a program: at rank 16 a wide load a thread, and programs for all multiprocessors at a few thousand rows."""


@triton.jit
def _write_parts(
    t_ptr,
    out_ptr,
    pid_l,
    L,
    R,
    WIDTH,
    stride_tl,
    stride_tr,
    MIDDLE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_L rows and BLOCK_R of the rank of t [L, R] as three parts in out [L, WIDTH]: number MIDDLE is tm, the others th."""
    offs_l = offsets(pid_l * BLOCK_L, BLOCK_L)
    offs_r = offsets(tl.program_id(1) * BLOCK_R, BLOCK_R)
    mask_l = offs_l < L
    mask_r = offs_r < R
    t_ptrs = t_ptr + offs_l[:, None] * stride_tl + offs_r[None, :] * stride_tr
    t = tl.load(t_ptrs, mask=mask_l[:, None] & mask_r[None, :], other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_R]
    high = narrow(t, tl.bfloat16)
    # Of an infinite t it is nan, as in a dot in parts.
    middle = narrow(t - high.to(tl.float32), tl.bfloat16)
    out_ptrs = out_ptr + offs_l[:, None] * WIDTH + offs_r[None, :]
    for part in tl.static_range(3):
        tl.store(out_ptrs + part * R, middle if part == MIDDLE else high, mask=mask_l[:, None] & mask_r[None, :])
    if (3 * R < WIDTH) & (tl.program_id(1) == 0):
        offs_end = 3 * R + offsets(0, 8)
        end_ptrs = out_ptr + offs_l[:, None] * WIDTH + offs_end[None, :]
        mask_end = mask_l[:, None] & (offs_end < WIDTH)[None, :]
        tl.store(end_ptrs, tl.zeros((BLOCK_L, 8), tl.bfloat16), mask=mask_end)


@triton.jit(do_not_specialize=["M"])
def _in_parts_kernel(
    s_ptr,
    b_ptr,
    s3_ptr,
    b3_ptr,
    M,
    N,
    R,
    WIDTH,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    CHAIN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_STEP: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
):
    """``s3 = [Sh | Sh | Sm | 0]`` [M, WIDTH] and ``b3 = [Bh | Bm | Bh | 0]`` [N, WIDTH], contiguous bf16, for S [M, R] and
    B [N, R].

    One program writes BLOCK_R columns of each part of BLOCK_L rows: the first programs of S, the rest of B.
    """
    join_chain(CHAIN)
    R, WIDTH = in_steps(R, R_STEP), in_steps(WIDTH, 8)
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_L)
    if pid < tiles_m:
        _write_parts(s_ptr, s3_ptr, pid, M, R, WIDTH, in_steps(stride_sm, S_STEP), stride_sr, 2, BLOCK_L, BLOCK_R)
    else:
        pid -= tiles_m
        _write_parts(b_ptr, b3_ptr, pid, N, R, WIDTH, in_steps(stride_bn, B_STEP), stride_br, 1, BLOCK_L, BLOCK_R)


def possible(dtype: torch.dtype, low_rank_dtype: torch.dtype) -> bool:
    """Whether parts have x's `dtype` and stand for factors of `low_rank_dtype`; fp16 would not hold their range."""
    return dtype == torch.bfloat16 and low_rank_dtype == torch.float32


def width(R: int) -> int:
    """Columns of `in_parts`: three parts, and zeros up to whole 16 bytes."""
    return cdiv(3 * R, 8) * 8


def in_parts(s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(S3 [M, width], B3 [N, width])``, contiguous bf16, for s [M, R] (fp32) and b [N, R] (fp32 or narrower) of any strides;
    M, N >= 1."""
    (M, R), N = s.shape, b.shape[0]
    s3, b3 = (torch.empty(rows, width(R), device=s.device, dtype=torch.bfloat16) for rows in (M, N))
    rank = block_r(R)
    launch(
        _in_parts_kernel,
        (cdiv(M, _BLOCK_L) + cdiv(N, _BLOCK_L), cdiv(R, rank)),
        s,
        b,
        s3,
        b3,
        M,
        N,
        R,
        width(R),
        *s.stride(),
        *b.stride(),
        BLOCK_L=_BLOCK_L,
        BLOCK_R=rank,
        R_STEP=step_of(R),
        S_STEP=step_of(s.stride(0)),
        B_STEP=step_of(b.stride(0)),
        num_warps=4,
    )
    return s3, b3
