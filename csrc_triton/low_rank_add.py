"""``y += S Bᵀ`` in place, for a y that a layer this library does not own (quantized, foreign) has computed; and ``bias + S Bᵀ``
by itself, for a GEMM of the vendor's to be added to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, dot_precision, grouped_tile, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M"])
def _low_rank_add_kernel(
    y_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    M,
    N,
    R,
    stride_bias,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    DTYPE: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y = bias + S Bᵀ`` for y [M, N], bias [N], S [M, R], B [N, R]; IN_PLACE: added to y.

    One program writes one [BLOCK_M, BLOCK_N] tile of y; the sum is taken in fp32 and rounded once.
    """
    R, stride_sm, stride_bn = in_steps(R, S_STEP), in_steps(stride_sm, S_STEP), in_steps(stride_bn, B_STEP)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = offsets(pid_m * BLOCK_M, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if IN_PLACE:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
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
    _launch(y, None, s, b, in_place=True)


def low_rank_product(s: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``bias + S Bᵀ [M, N]`` in `dtype`, for s [M, R], b [N, R] and bias [N] of any strides; computed in s's dtype."""
    y = torch.empty(s.shape[0], b.shape[0], device=s.device, dtype=dtype)
    _launch(y, bias, s, b, in_place=False)
    return y


def _launch(y: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, in_place: bool) -> None:
    (M, N), R = y.shape, s.shape[1]
    if M == 0:
        return
    arch = configs.arch_of(y.device)
    config = configs.pick_config("low_rank_add", M, N, 0, R, y.dtype, arch, s.dtype)
    launch(
        _low_rank_add_kernel,
        (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),),
        y,
        bias,
        s,
        b,
        M,
        N,
        R,
        0 if bias is None else bias.stride(0),
        *y.stride(),
        *s.stride(),
        *b.stride(),
        DTYPE=TRITON_DTYPE[y.dtype],
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        PRECISION=dot_precision(s.dtype, y.dtype, y.dtype),
        IN_PLACE=in_place,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=config.BLOCK_R,
        S_STEP=step_of(R, s.stride(0)),
        B_STEP=step_of(b.stride(-2)),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
