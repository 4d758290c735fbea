"""``y += S Bᵀ`` in place, for a y that a layer this library does not own (quantized, foreign) has computed."""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, dot_precision, grouped_tile, narrow, offsets


@triton.jit(do_not_specialize=["M"])
def _low_rank_add_kernel(
    y_ptr,
    s_ptr,
    b_ptr,
    M,
    N,
    R,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    DTYPE: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y += S Bᵀ`` for y [M, N], S [M, R], B [N, R].

    One program updates one [BLOCK_M, BLOCK_N] tile of y; the sum is taken in fp32 and rounded once.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = offsets(pid_m * BLOCK_M, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    acc = add_low_rank(
        acc,
        (s_ptr, stride_sm, stride_sr),
        (b_ptr, stride_bn, stride_br),
        offs_m,
        offs_n,
        mask_m,
        mask_n,
        R,
        LOW_RANK_DTYPE,
        PRECISION,
        BLOCK_R,
    )
    tl.store(y_ptrs, narrow(acc, DTYPE), mask=mask)


def low_rank_add(y: Tensor, s: Tensor, b: Tensor) -> None:
    """``y += S Bᵀ`` in place, for y [M, N], s [M, R] and b [N, R] of any strides; computed in s's dtype."""
    (M, N), R = y.shape, s.shape[1]
    if M == 0:
        return
    arch = configs.arch_of(y.device)
    config = configs.pick_config("low_rank_add", M, N, 0, R, y.dtype, arch, s.dtype)
    launch(
        _low_rank_add_kernel,
        (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),),
        y,
        s,
        b,
        M,
        N,
        R,
        *y.stride(),
        *s.stride(),
        *b.stride(),
        DTYPE=TRITON_DTYPE[y.dtype],
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        PRECISION=dot_precision(s.dtype, y.dtype, y.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=config.BLOCK_R,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
