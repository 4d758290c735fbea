"""Gram matrices, and the ALLoRA coefficient C of every rule that needs a norm of a whole row or matrix.

Nothing here forms the N x K product BA: ``‖(BA)[i,:]‖² = B[i,:] (A Aᵀ) B[i,:]ᵀ``, ``‖BA‖_F² = Σ (A Aᵀ) ⊙ (BᵀB)`` and
``‖(S Bᵀ)[m,:]‖² = S[m,:] (BᵀB) S[m,:]ᵀ``. All norms are taken in fp32, whatever the factors' dtypes.

A Gram matrix stays in parts, one a run of columns; the kernel that needs it adds them, in order, as it loads them. So C is
cheap enough to be computed in every backward pass: two launches, for "factor" one.

Factors may have a dimension for groups in front, a [E, R, K] and b [E, N, R]: the same launches then give every group's, with
an η for all or 1/η² [E] (fp32) of each.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .chain import end_round, join_chain, leave_chain, wait_for_counted
from .configs import cdiv
from .groups import group_strides
from .launching import launch
from .tiling import TRITON_DTYPE, added_apart, coefficient, dot, offsets, sqrt_of_square

_BLOCK_R = 32
_BLOCK_L = 64
_MAX_PARTS = 32
"""Every program that needs the Gram matrix reads all of its parts."""


@triton.jit
def _gram_kernel(
    f_ptr,
    partial_ptr,
    under_way_ptr,
    L,
    R,
    stride_fg,
    stride_fr,
    stride_fl,
    SPLIT_L,
    PARTS,
    CHAIN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """``partial[g, p] = F_g[:, part p] F_g[:, part p]ᵀ`` for F [E, R, L], partial [E, P, R, R], part p = SPLIT_L columns.

    One program writes one [BLOCK_R, BLOCK_R] tile of one part. Products of 16-bit elements are exact in fp32, in which they
    are added up. With counts the program is counted (`chain`).
    """
    join_chain(CHAIN, under_way_ptr)
    offs_i = offsets(tl.program_id(0) * BLOCK_R, BLOCK_R)
    offs_j = offsets(tl.program_id(1) * BLOCK_R, BLOCK_R)
    part = tl.program_id(2) % PARTS
    f_ptr += (tl.program_id(2) // PARTS).to(tl.int64) * stride_fg
    mask_i = offs_i < R
    mask_j = offs_j < R
    start = part * SPLIT_L
    stop = min(start + SPLIT_L, L)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for l in range(start, stop, BLOCK_L):
        offs_l = offsets(l, BLOCK_L)
        mask_l = offs_l < stop
        rows_ptrs = f_ptr + offs_i[:, None] * stride_fr + offs_l[None, :] * stride_fl
        columns_ptrs = f_ptr + offs_l[:, None] * stride_fl + offs_j[None, :] * stride_fr
        rows = tl.load(rows_ptrs, mask=mask_i[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_R, BLOCK_L]
        columns = tl.load(columns_ptrs, mask=mask_l[:, None] & mask_j[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
        acc = added_apart(dot(rows, columns, tl.zeros_like(acc), DTYPE, PRECISION), acc)
    partial_ptrs = partial_ptr + tl.program_id(2).to(tl.int64) * R * R + offs_i[:, None] * R + offs_j[None, :]
    tl.store(partial_ptrs, acc, mask=mask_i[:, None] & mask_j[None, :])
    end_round(under_way_ptr, 0)
    leave_chain(CHAIN)


def gram_parts(factor: Tensor, under_way: Tensor | None = None) -> Tensor:
    """``F Fᵀ`` as the sum of parts [P, R, R] in fp32, for a factor [R, L] of any strides; [E, P, R, R] for one [E, R, L]. With
    `under_way` (`chain.counts`) by counted programs."""
    *groups, R, L = factor.shape
    groups = math.prod(groups)
    tiles = cdiv(R, _BLOCK_R)
    whole = factor.dtype == torch.float32
    # Three parts of each operand fill the registers.
    block_l = _BLOCK_L // 2 if whole else _BLOCK_L
    parts = configs.num_splits(groups * tiles * tiles, L, 4 * block_l, configs.arch_of(factor.device), waves=1)
    split_l = cdiv(cdiv(L, min(parts, _MAX_PARTS)), block_l) * block_l
    parts = cdiv(L, split_l)
    partial = torch.empty(*factor.shape[:-2], parts, R, R, device=factor.device, dtype=torch.float32)
    launch(
        _gram_kernel,
        (tiles, tiles, groups * parts),
        factor,
        partial,
        under_way,
        L,
        R,
        *group_strides(factor),
        split_l,
        parts,
        DTYPE=TRITON_DTYPE[factor.dtype],
        PRECISION="split3" if whole else "ieee",
        BLOCK_R=_BLOCK_R,
        BLOCK_L=block_l,
        num_warps=4,
        num_stages=2,
        **configs.all_registers(configs.arch_of(factor.device)),
    )
    return partial


@triton.jit
def _add_parts(ptr, offs, mask, PARTS, stride_part):
    """The sum, in order, of what lies at `offs` in each of PARTS parts."""
    total = tl.zeros(offs.shape, tl.float32)
    # Four loads at a time: one after another each would wait for the one before it.
    for _ in tl.range(0, PARTS, loop_unroll_factor=4):
        total += tl.load(ptr + offs, mask=mask, other=0.0)
        ptr += stride_part
    return total


@triton.jit(do_not_specialize=["L", "PARTS"])
def _quadratic_coefficient_kernel(
    v_ptr,
    q_ptr,
    inv_etas_squared_ptr,
    c_ptr,
    under_way_ptr,
    L,
    R,
    PARTS,
    stride_vg,
    stride_vl,
    stride_vr,
    inv_eta_squared,
    CHAIN: tl.constexpr,
    HAS_ETAS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``c[g, l] = C(√(v_g[l,:] Q_g v_g[l,:]ᵀ))`` for v [E, L, R], Q_g the sum of parts [E, PARTS, R, R] (fp32, contiguous),
    c [E, L] fp32.

    One program writes BLOCK_L coefficients; the quadratic form is clamped at 0, below which only rounding takes it. With
    counts Q's parts are what counted programs write (`chain`).
    """
    join_chain(CHAIN)
    wait_for_counted(under_way_ptr)
    group = tl.program_id(1).to(tl.int64)
    v_ptr += group * stride_vg
    q_ptr += group * PARTS * R * R
    c_ptr += group * L
    offs_l = offsets(tl.program_id(0) * BLOCK_L, BLOCK_L)
    mask_l = offs_l < L
    form = tl.zeros((BLOCK_L,), tl.float32)
    for j in range(0, R, BLOCK_R):
        offs_j = offsets(j, BLOCK_R)
        mask_j = offs_j < R
        product = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        for i in range(0, R, BLOCK_R):
            offs_i = offsets(i, BLOCK_R)
            mask_i = offs_i < R
            v_ptrs = v_ptr + offs_l[:, None] * stride_vl + offs_i[None, :] * stride_vr
            # Parts of at most 256 x 256 are within 32 bits, which leaves registers for the dot.
            offs_q = (i + tl.arange(0, BLOCK_R))[:, None] * R + (j + tl.arange(0, BLOCK_R))[None, :]
            v = tl.load(v_ptrs, mask=mask_l[:, None] & mask_i[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
            q = _add_parts(q_ptr, offs_q, mask_i[:, None] & mask_j[None, :], PARTS, R * R)  # [BLOCK_R, BLOCK_R]
            product = dot(v, q, product, tl.float32, "split3")
        v_ptrs = v_ptr + offs_l[:, None] * stride_vl + offs_j[None, :] * stride_vr
        v = tl.load(v_ptrs, mask=mask_l[:, None] & mask_j[None, :], other=0.0).to(tl.float32)
        form += tl.sum(product * v, axis=1)
    if HAS_ETAS:
        # Here and not before the loops, which need the register.
        inv_eta_squared = tl.load(inv_etas_squared_ptr + tl.program_id(1))
    c = coefficient(sqrt_of_square(form), inv_eta_squared)
    tl.store(c_ptr + offs_l, c, mask=mask_l)
    leave_chain(CHAIN)


def quadratic_coefficient(
    v: Tensor, q: Tensor, eta: float, inv_etas_squared: Tensor | None = None, under_way: Tensor | None = None
) -> Tensor:
    """``C(√(v[l,:] Q v[l,:]ᵀ)) [L]`` in fp32 for v [L, R] of any strides and a Gram matrix in parts q [P, R, R]; [E, L] for v
    [E, L, R] and q [E, P, R, R]. With `under_way` q may be what counted programs write."""
    *groups, L, R = v.shape
    c = torch.empty(v.shape[:-1], device=v.device, dtype=torch.float32)
    if L == 0:
        return c
    # Of 16-bit rows in whole wide loads a program takes few registers, and has room beside a GEMM.
    small = v.itemsize == 2 and R % 8 == 0
    launch(
        _quadratic_coefficient_kernel,
        (cdiv(L, _BLOCK_L), math.prod(groups)),
        v,
        q,
        inv_etas_squared,
        c,
        under_way,
        L,
        R,
        q.shape[-3],
        *group_strides(v),
        eta**-2,
        HAS_ETAS=inv_etas_squared is not None,
        BLOCK_L=_BLOCK_L,
        # Wider tiles of three parts spill.
        BLOCK_R=configs.block_r(R, 32),
        num_warps=4 if small else 8,
        num_stages=1,
        **({} if small else configs.all_registers(configs.arch_of(v.device))),
    )
    return c


@triton.jit(do_not_specialize=["PARTS_A", "PARTS_B"])
def _matrix_coefficient_kernel(
    gram_a_ptr,
    gram_b_ptr,
    inv_etas_squared_ptr,
    c_ptr,
    NUMEL,
    PARTS_A,
    PARTS_B,
    inv_eta_squared,
    CHAIN: tl.constexpr,
    HAS_ETAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``c[g] = C(√(Σ (A_g A_gᵀ) ⊙ (B_gᵀB_g)))`` for two Gram matrices of NUMEL elements a group, in contiguous parts; c [E].

    One program writes one group's number; accumulates in fp32.
    """
    join_chain(CHAIN)
    group = tl.program_id(0).to(tl.int64)
    gram_a_ptr += group * PARTS_A * NUMEL
    gram_b_ptr += group * PARTS_B * NUMEL
    if HAS_ETAS:
        inv_eta_squared = tl.load(inv_etas_squared_ptr + group)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, NUMEL, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < NUMEL
        gram_a = _add_parts(gram_a_ptr, offs, mask, PARTS_A, NUMEL)
        total += gram_a * _add_parts(gram_b_ptr, offs, mask, PARTS_B, NUMEL)
    tl.store(c_ptr + group, coefficient(sqrt_of_square(tl.sum(total, axis=0)), inv_eta_squared))


@triton.jit
def _row_coefficients(
    f_ptr, c_ptr, start, L, D, stride_fl, stride_fd, inv_eta_squared, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``c[l] = C(‖F[l,:]‖)`` for BLOCK_L rows of F [L, D] from `start` on."""
    offs_l = offsets(start, BLOCK_L)
    mask_l = offs_l < L
    squares = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = offsets(d, BLOCK_D)
        f_ptrs = f_ptr + offs_l[:, None] * stride_fl + offs_d[None, :] * stride_fd
        f = tl.load(f_ptrs, mask=mask_l[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        squares += f * f
    norms = tl.sqrt_rn(tl.sum(squares, axis=1))
    tl.store(c_ptr + offs_l, coefficient(norms, inv_eta_squared), mask=mask_l)


@triton.jit
def _factor_coefficient_kernel(
    a_ptr,
    b_ptr,
    inv_etas_squared_ptr,
    c_ptr,
    N,
    K,
    R,
    stride_ag,
    stride_ar,
    stride_ak,
    stride_bg,
    stride_bn,
    stride_br,
    inv_eta_squared,
    CHAIN: tl.constexpr,
    HAS_ETAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``c_g = [C(‖B_g[n,:]‖), C(‖A_g[r,:]‖)]`` for A [E, R, K], B [E, N, R], c [E, N + R] fp32.

    One program writes the coefficients of BLOCK_N rows of B, or of one of A's few, long rows.
    """
    join_chain(CHAIN)
    group = tl.program_id(1).to(tl.int64)
    a_ptr += group * stride_ag
    b_ptr += group * stride_bg
    c_ptr += group * (N + R)
    if HAS_ETAS:
        inv_eta_squared = tl.load(inv_etas_squared_ptr + group)
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0)
    if block < blocks:
        _row_coefficients(b_ptr, c_ptr, block * BLOCK_N, N, R, stride_bn, stride_br, inv_eta_squared, BLOCK_N, BLOCK_R)
    else:
        _row_coefficients(a_ptr, c_ptr + N, block - blocks, R, K, stride_ar, stride_ak, inv_eta_squared, 1, BLOCK_K)


def factor_coefficient(a: Tensor, b: Tensor, eta: float, inv_etas_squared: Tensor | None = None) -> Tensor:
    """``[C(‖b[n,:]‖), C(‖a[r,:]‖)] [N + R]`` in fp32 for a [R, K] and b [N, R] of any strides; with groups [E, N + R]."""
    *groups, R, K = a.shape
    N = b.shape[-2]
    c = torch.empty(*groups, N + R, device=a.device, dtype=torch.float32)
    launch(
        _factor_coefficient_kernel,
        (cdiv(N, _BLOCK_L) + R, math.prod(groups)),
        a,
        b,
        inv_etas_squared,
        c,
        N,
        K,
        R,
        *group_strides(a),
        *group_strides(b),
        eta**-2,
        HAS_ETAS=inv_etas_squared is not None,
        BLOCK_N=_BLOCK_L,
        BLOCK_R=16,
        BLOCK_K=1024,
        num_warps=4,
        num_stages=2,
        **configs.all_registers(configs.arch_of(a.device)),
    )
    return c


WEIGHT_NORMS = ("row", "matrix", "factor")
"""The rules whose C depends on A and B alone."""


def weight_coefficient(a: Tensor, b: Tensor, eta: float, norm: str, inv_etas_squared: Tensor | None = None) -> Tensor:
    """C in fp32 of a weight-dependent rule, for a [R, K] and b [N, R] of any strides: ``"row"`` [N]; ``"matrix"`` [1];
    ``"factor"`` [N + R], first the coefficients of b's rows, then those of a's. For a [E, R, K] and b [E, N, R] with E in
    front; `inv_etas_squared` [E] (fp32) then stands for `eta`."""
    if norm == "row":
        return quadratic_coefficient(b, gram_parts(a), eta, inv_etas_squared)
    if norm == "matrix":
        gram_a, gram_b = gram_parts(a), gram_parts(b.mT)
        c, numel = torch.empty(*a.shape[:-2], 1, device=a.device, dtype=torch.float32), a.shape[-2] ** 2
        parts = (gram_a.shape[-3], gram_b.shape[-3])
        launch(
            _matrix_coefficient_kernel,
            (c.numel(),),
            gram_a,
            gram_b,
            inv_etas_squared,
            c,
            numel,
            *parts,
            eta**-2,
            HAS_ETAS=inv_etas_squared is not None,
            BLOCK=1024,
            num_warps=4,
            **configs.all_registers(configs.arch_of(a.device)),
        )
        return c
    assert norm == "factor", norm
    return factor_coefficient(a, b, eta, inv_etas_squared)


def row_coefficient_late(a: Tensor, b: Tensor, eta: float, under_way: Tensor) -> Tensor:
    """`weight_coefficient` of the rule "row", [N], by two "late" kernels of a chain, of which the second waits for the first
    alone, by `chain.counts`."""
    return quadratic_coefficient(b, gram_parts(a, under_way), eta, under_way=under_way)


def token_coefficient(s: Tensor, b: Tensor, eta: float) -> Tensor:
    """C [M] in fp32 of the rule ``"token"``, for s [M, R] and b [N, R]."""
    return quadratic_coefficient(s, gram_parts(b.mT), eta)
