"""Norms of per-sample gradients of very short samples, without the gradients.

``‖V_iᵀ U_i‖² = Σ (V_i V_iᵀ) ⊙ (U_i U_iᵀ)``: two matrices as large as the sample has rows, squared. A tile holds several
whole samples, so that a dot has no empty rows; products of rows of different samples are dropped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, coefficient, dot, dot_precision, offsets

GRAM_ROWS = 32
"""Rows in a tile: the longest sample this form takes."""

_BLOCK_L = 64


@triton.jit(do_not_specialize=["SAMPLES", "PER_PROGRAM", "SAMPLE_M", "SPLIT_L"])
def _sample_gram_kernel(
    v_ptr,
    u_ptr,
    f_ptr,
    scale_ptr,
    row_scale_ptr,
    starts_ptr,
    squares_ptr,
    SAMPLES,
    L,
    R,
    stride_vm,
    stride_vl,
    stride_um,
    stride_ur,
    stride_fl,
    stride_fr,
    stride_scale,
    stride_row_scale,
    PER_PROGRAM,
    SAMPLE_M,
    SPLIT_L,
    inv_eta_squared,
    ENTRY: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION_V: tl.constexpr,
    PRECISION_U: tl.constexpr,
    PRECISION_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``squares[p, i] = Σ (V~_i V~_iᵀ) ⊙ (U~_i U~_iᵀ)`` over part p of V's columns, for V [M, L], U [M, R]; F [L, R].

    One program owns PER_PROGRAM samples in a row, BLOCK_M rows at most together, and SPLIT_L columns; squares [P, b]
    fp32. What ~ means is as in the sweep; accumulates in fp32.
    """
    first = tl.program_id(0) * PER_PROGRAM
    last = min(first + PER_PROGRAM, SAMPLES)
    part = tl.program_id(1)
    offs_i = first + tl.arange(0, BLOCK_M)
    if HAS_STARTS:
        start = tl.load(starts_ptr + first)
        stop = tl.load(starts_ptr + last)
        ends = tl.load(starts_ptr + offs_i + 1, mask=offs_i < last, other=0x7FFFFFFF)  # [BLOCK_M]
    else:
        start = first * SAMPLE_M
        stop = last * SAMPLE_M
        ends = tl.where(offs_i < last, (offs_i + 1) * SAMPLE_M, 0x7FFFFFFF)
    offs_m = offsets(start, BLOCK_M)
    mask_m = offs_m < stop
    # Which of the program's samples a row is of: how many end at or before it.
    owner = tl.sum((ends[None, :] <= offs_m[:, None]).to(tl.int32), axis=1)  # [BLOCK_M]

    gram_v = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for l in range(part * SPLIT_L, min(part * SPLIT_L + SPLIT_L, L), BLOCK_L):
        offs_l = offsets(l, BLOCK_L)
        mask_l = offs_l < L
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_l[None, :] * stride_vl
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        if ENTRY:
            product = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
            product = add_low_rank(
                product,
                u_ptr,
                f_ptr,
                offs_m,
                offs_l,
                mask_m,
                mask_l,
                R,
                stride_um,
                stride_ur,
                stride_fl,
                stride_fr,
                DTYPE,
                PRECISION_F,
                BLOCK_R,
            )
            v = v * coefficient(tl.abs(product), inv_eta_squared)
        elif SCALE == "columns":
            v = v * tl.load(scale_ptr + offs_l * stride_scale, mask=mask_l, other=0.0)[None, :]
        gram_v = dot(v, tl.trans(v), gram_v, DTYPE, PRECISION_V)

    gram_u = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = offsets(r, BLOCK_R)
        mask_r = offs_r < R
        u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if HAS_ROW_SCALE:
            u = u * tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)[:, None]
        if SCALE == "rank":
            u = u * tl.load(scale_ptr + offs_r * stride_scale, mask=mask_r, other=0.0)[None, :]
        gram_u = dot(u, tl.trans(u), gram_u, DTYPE, PRECISION_U)

    same = (owner[:, None] == owner[None, :]) & mask_m[:, None] & mask_m[None, :]
    rows = tl.sum(tl.where(same, gram_v * gram_u, 0.0), axis=1)  # [BLOCK_M]
    mine = owner[None, :] == tl.arange(0, BLOCK_M)[:, None]
    squares = tl.sum(tl.where(mine, rows[None, :], 0.0), axis=1)
    # Rounding may take the sum of nearly orthogonal rows below zero; a nan stays one.
    tl.store(squares_ptr + part.to(tl.int64) * SAMPLES + offs_i, squares, mask=offs_i < last)


def sample_gram(v: Tensor, u: Tensor, f: Tensor | None, rule, segments) -> Tensor:
    """``‖scale ⊙ V~_iᵀ U~_i‖² [b]`` in fp32 for v [M, L], u [M, R] and samples of at most GRAM_ROWS rows; M >= 1."""
    L, R, arch = v.shape[1], u.shape[1], configs.arch_of(v.device)
    per_program = max(1, GRAM_ROWS // segments.longest)
    programs = cdiv(segments.count, per_program)
    parts = configs.num_splits(programs, L, 4 * _BLOCK_L, arch)
    split_l = cdiv(cdiv(L, parts), _BLOCK_L) * _BLOCK_L
    parts = cdiv(L, split_l)
    squares = torch.empty(parts, segments.count, device=v.device, dtype=torch.float32)
    launch(
        _sample_gram_kernel,
        (programs, parts),
        v,
        u,
        f,
        rule.scale,
        rule.row_scale,
        segments.pieces,
        squares,
        segments.count,
        L,
        R,
        *v.stride(),
        *u.stride(),
        *((0, 0) if f is None else f.stride()),
        0 if rule.scale is None else rule.scale.stride(0),
        0 if rule.row_scale is None else rule.row_scale.stride(0),
        per_program,
        segments.longest,
        split_l,
        rule.eta**-2,
        ENTRY=rule.norm == "entry",
        SCALE=rule.axis,
        HAS_ROW_SCALE=rule.row_scale is not None,
        HAS_STARTS=segments.pieces is not None,
        DTYPE=TRITON_DTYPE[u.dtype],
        PRECISION_V=_precision(v.dtype, u.dtype),
        PRECISION_U=_precision(u.dtype, u.dtype),
        PRECISION_F=dot_precision(u.dtype, v.dtype, u.dtype),
        BLOCK_M=GRAM_ROWS,
        BLOCK_L=_BLOCK_L,
        BLOCK_R=configs.block_r(R, 32),
        num_warps=8,
        num_stages=2,
    )
    return squares.sum(dim=0).clamp_min(0)


def _precision(dtype: torch.dtype, compute: torch.dtype) -> str:
    """A 16-bit tile times an fp32 coefficient is split into bf16 parts; alone it is one of them."""
    return dot_precision(torch.float32, dtype, compute)
