"""Norms of per-sample gradients of samples of one row, without the gradients: ``‖v uᵀ‖ = ‖v‖ ‖u‖``.

Longer samples have no such form that keeps its digits: ``Σ (V Vᵀ) ⊙ (U Uᵀ)`` is what is left of large terms where their rows
cancel, down to a negative square.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, dot_precision, entry_coefficient, offsets

_BLOCK_M = 32
_BLOCK_L = 64


@triton.jit(do_not_specialize=["SAMPLES", "TILES_L"])
def _outer_norms_kernel(
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
    TILES_L,
    inv_eta_squared,
    ENTRY: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``squares[p, i] = ‖v~_i‖² ‖u~_i‖²`` over part p of v's columns, v~_i and u~_i sample i's row of V [M, L], U [M, R].

    One program owns BLOCK_M samples and TILES_L tiles of columns; squares [P, b] fp32. With starts [b + 1] a sample is the row
    where it starts, or none. F [L, R], and what ~ means, are as in the sweep.
    """
    part = tl.program_id(1)
    offs_i = offsets(tl.program_id(0) * BLOCK_M, BLOCK_M)
    mask_i = offs_i < SAMPLES
    offs_m, mask_m = offs_i, mask_i
    if HAS_STARTS:
        offs_m = tl.load(starts_ptr + offs_i, mask=mask_i, other=0).to(tl.int64)
        mask_m = offs_m < tl.load(starts_ptr + offs_i + 1, mask=mask_i, other=0)

    squares_v = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for l in range(part * TILES_L * BLOCK_L, min((part + 1) * TILES_L * BLOCK_L, L), BLOCK_L):
        offs_l = offsets(l, BLOCK_L)
        mask_l = offs_l < L
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_l[None, :] * stride_vl
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_L]
        if ENTRY:
            u_args, f_args = (u_ptr, stride_um, stride_ur), (f_ptr, stride_fl, stride_fr)
            c = entry_coefficient(
                u_args,
                f_args,
                offs_m,
                offs_l,
                mask_m,
                mask_l,
                R,
                inv_eta_squared,
                DTYPE,
                PRECISION,
                BLOCK_M,
                BLOCK_L,
                BLOCK_R,
            )
            v *= c
        elif SCALE == "columns":
            v *= tl.load(scale_ptr + offs_l * stride_scale, mask=mask_l, other=0.0)[None, :]
        squares_v += v * v

    squares_u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = offsets(r, BLOCK_R)
        mask_r = offs_r < R
        u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
        if SCALE == "rank":
            u *= tl.load(scale_ptr + offs_r * stride_scale, mask=mask_r, other=0.0)[None, :]
        squares_u += u * u

    squares = tl.sum(squares_v, axis=1) * tl.sum(squares_u, axis=1)
    if HAS_ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)
        squares *= row_scale * row_scale
    tl.store(squares_ptr + part.to(tl.int64) * SAMPLES + offs_i, squares, mask=mask_i)


def outer_norms(v: Tensor, u: Tensor, f: Tensor | None, rule, segments) -> Tensor:
    """``‖scale ⊙ v~_i u~_iᵀ‖² [b]`` in fp32 for v [M, L], u [M, R] and samples of one row or none; M >= 1."""
    L, R, arch = v.shape[1], u.shape[1], configs.arch_of(v.device)
    programs = cdiv(segments.count, _BLOCK_M)
    parts = configs.num_splits(programs, L, 4 * _BLOCK_L, arch)
    tiles_l = cdiv(cdiv(L, parts), _BLOCK_L)
    parts = cdiv(L, tiles_l * _BLOCK_L)
    squares = torch.empty(parts, segments.count, device=v.device, dtype=torch.float32)
    precision = dot_precision(u.dtype, v.dtype, u.dtype)
    launch(
        _outer_norms_kernel,
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
        tiles_l,
        rule.eta**-2,
        ENTRY=rule.norm == "entry",
        SCALE=rule.axis,
        HAS_ROW_SCALE=rule.row_scale is not None,
        HAS_STARTS=segments.pieces is not None,
        DTYPE=TRITON_DTYPE[u.dtype],
        PRECISION=precision,
        BLOCK_M=_BLOCK_M,
        BLOCK_L=_BLOCK_L,
        BLOCK_R=configs.block_r(R, 16 if precision.startswith("split") else 32),
        num_warps=8,
        num_stages=2,
        **configs.all_registers(arch),
    )
    return squares.sum(dim=0)
