"""The adapter's backward: one sweep over G and one over x, each in two deterministic stages.

Stage 1 cuts the rows into segments and writes, for each, its own ``dBᵀ``- or ``dA``-shaped sum; on the way the sweep
over G also yields ``dS = G B``, which dX needs. Stage 2 (`combine`) adds the segments in order. There are no atomics:
the same inputs give the same bits. A rule of the coefficient C enters as what it multiplies:

    row     C[i] of G's column i: B's rows (for dA), and dB's rows after the sum
    matrix  one number: dA and dB after the sum
    factor  dA's rows and dB's rows after the sum
    token   C[m] of G's row m: S's rows (for dB) and dS's rows (for dA)
    entry   C[m,i]: the tile of G itself, from the tile of S Bᵀ recomputed beside it
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .combine import combine
from .down_project import down_project
from .row_norms import token_coefficient
from .sweep_plan import SweepPlan, plan_sweep, sums_over_columns, total_segments
from .tiling import TRITON_DTYPE, add_low_rank, coefficient, dot, dot_precision, launch, offsets


@triton.jit(do_not_specialize=["M", "SEGMENT_M"])
def _sweep_kernel(
    v_ptr,
    u_ptr,
    f_ptr,
    c_ptr,
    outer_ptr,
    projected_ptr,
    scaled_ptr,
    M,
    L,
    R,
    stride_vm,
    stride_vl,
    stride_um,
    stride_ur,
    stride_fl,
    stride_fr,
    stride_c,
    stride_op,
    stride_ol,
    stride_or,
    SEGMENT_M,
    inv_eta_squared,
    NORM: tl.constexpr,
    OUTER: tl.constexpr,
    PROJECT: tl.constexpr,
    PROJECT_SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``outer[p] = V~ᵀ U~``, ``projected = V F`` and ``scaled = V~ F~`` for V [M, L], U [M, R], F [L, R]; ~ as NORM says.

    One program owns segment p (SEGMENT_M rows), BLOCK_L columns of V and BLOCK_R of the rank: it writes one
    [BLOCK_L, BLOCK_R] tile of outer [P, L, R], and its columns' share of projected and scaled [L/BLOCK_L, M, R].
    Every tile of V is loaded once; accumulates in fp32.
    """
    pid_l = tl.program_id(0)
    segment = tl.program_id(1)
    offs_l = offsets(pid_l * BLOCK_L, BLOCK_L)
    offs_r = offsets(tl.program_id(2) * BLOCK_R, BLOCK_R)
    mask_l = offs_l < L
    mask_r = offs_r < R
    if PROJECT or PROJECT_SCALED:
        f_ptrs = f_ptr + offs_l[:, None] * stride_fl + offs_r[None, :] * stride_fr
        f = tl.load(f_ptrs, mask=mask_l[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
        f_scaled = f
        if NORM == "row":
            f_scaled = f * tl.load(c_ptr + offs_l * stride_c, mask=mask_l, other=0.0)[:, None]

    start = segment * SEGMENT_M
    stop = min(start + SEGMENT_M, M)
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = offsets(m, BLOCK_M)
        mask_m = offs_m < stop
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_l[None, :] * stride_vl
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        v_scaled = v
        if NORM == "entry":
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
                PRECISION,
                BLOCK_R,
            )
            v_scaled = v * coefficient(tl.abs(product), inv_eta_squared)

        projected_ptrs = (pid_l.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if PROJECT:
            tl.store(projected_ptr + projected_ptrs, dot(v, f, zeros, DTYPE, PRECISION), mask=mask_mr)
        if PROJECT_SCALED:
            tl.store(scaled_ptr + projected_ptrs, dot(v_scaled, f_scaled, zeros, DTYPE, PRECISION), mask=mask_mr)
        if OUTER:
            u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
            u = tl.load(u_ptrs, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
            if NORM == "token":
                u = u * tl.load(c_ptr + offs_m * stride_c, mask=mask_m, other=0.0)[:, None]
            acc = dot(tl.trans(v_scaled), u, acc, DTYPE, PRECISION)
    if OUTER:
        outer_ptrs = (
            outer_ptr + segment.to(tl.int64) * stride_op + offs_l[:, None] * stride_ol + offs_r[None, :] * stride_or
        )
        tl.store(outer_ptrs, acc, mask=mask_l[:, None] & mask_r[None, :])


def _sweep(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    outer_layout: str,
    projected: Tensor | None,
    scaled: Tensor | None,
    plan: SweepPlan,
) -> Tensor | None:
    """Both stages of the sums over v's columns, the first of those over its rows; v [M, L], M >= 1.

    Fills `projected` and `scaled` [M, R], where they are wanted. Returns the segments' sums of ``V~ᵀ U~`` in fp32:
    [P, L, R] for `outer_layout` "LR", [P, R, L] for "RL", None for "".
    """
    (M, L), R, config = v.shape, u.shape[1], plan.config
    tiles_l, tiles_r = triton.cdiv(L, config.BLOCK_N), triton.cdiv(R, config.BLOCK_R)
    # Every tile of columns has its own [rows, R] share of projected and scaled.
    wanted = [t for t in (projected, scaled) if t is not None]
    chunk_m, segment_m = plan.chunk_rows, plan.segment_rows
    segments = triton.cdiv(min(M, chunk_m), segment_m)

    fp32 = {"device": v.device, "dtype": torch.float32}
    outer = None
    if outer_layout:
        shape = (L, R) if outer_layout == "LR" else (R, L)
        outer = torch.empty(total_segments(M, chunk_m, segment_m), *shape, **fp32)
    shares = [torch.empty(tiles_l, min(M, chunk_m), R, **fp32) for _ in wanted]

    for chunk in range(triton.cdiv(M, chunk_m)):
        rows = slice(chunk * chunk_m, min(M, (chunk + 1) * chunk_m))
        num_rows = rows.stop - rows.start
        # The same memory for every chunk, contiguous for its number of rows.
        parts = [share.view(-1)[: tiles_l * num_rows * R].view(tiles_l, num_rows, R) for share in shares]
        projected_part = parts[0] if projected is not None else None
        scaled_part = parts[-1] if scaled is not None else None
        outer_part = None if outer is None else outer[chunk * segments : (chunk + 1) * segments]
        if outer_layout == "RL":
            outer_part = outer_part.mT
        launch(
            _sweep_kernel,
            (tiles_l, triton.cdiv(num_rows, segment_m), tiles_r),
            v[rows],
            u[rows],
            f,
            c[rows] if norm == "token" else c,
            outer_part,
            projected_part,
            scaled_part,
            num_rows,
            L,
            R,
            *v.stride(),
            *u.stride(),
            *((0, 0) if f is None else f.stride()),
            0 if c is None else c.stride(0),
            *((0, 0, 0) if outer_part is None else outer_part.stride()),
            segment_m,
            eta**-2,
            NORM=norm,
            OUTER=outer is not None,
            PROJECT=projected is not None,
            PROJECT_SCALED=scaled is not None,
            DTYPE=TRITON_DTYPE[u.dtype],
            PRECISION=dot_precision(u.dtype, v.dtype, u.dtype),
            BLOCK_M=config.BLOCK_M,
            BLOCK_L=config.BLOCK_N,
            BLOCK_R=config.BLOCK_R,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        for target, part in zip(wanted, parts):
            combine(part, target.dtype, out=target[rows])
    return outer


def adapter_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B [M, R]`` (s's dtype), ``dA = (g~ B)ᵀ x [R, K]`` and ``dB = g~ᵀ S [N, R]`` with ``g~ = C ⊙ g``.

    g [M, N], x [M, K], s [M, R] and b [N, R] of any strides; c as from `weight_coefficient` for the weight-dependent
    rules, else None. What is not needed (`need_ds` False, a dtype None) comes back empty; x may be None without dA.
    """
    (M, N), R, need_da, need_db = g.shape, s.shape[1], dtype_a is not None, dtype_b is not None
    # Three tensors: an op's results may not share storage.
    ds, da, db = (s.new_empty(0) for _ in range(3))
    if M == 0:
        ds = s.new_empty(0, R) if need_ds else ds
        da = s.new_zeros(R, x.shape[1], dtype=dtype_a) if need_da else da
        db = s.new_zeros(N, R, dtype=dtype_b) if need_db else db
        return ds, da, db

    scale_a = scale_b = None
    if norm == "row":
        scale_b = c
    elif norm == "matrix":
        scale_a, scale_b = c.expand(R), c.expand(N)
    elif norm == "factor":
        scale_b, scale_a = c[:N], c[N:]
    elif norm == "token":
        c = token_coefficient(s, b, eta)

    # u is g~ B. Where C does not touch the sum over g's columns it is dS, for "token" times C[m].
    apart = norm in ("row", "entry")
    sums = sums_over_columns(norm, need_ds, need_da)
    compute, arch = s.dtype, configs.arch_of(g.device)
    plan = plan_sweep(M, N, R, norm, sums, need_db, g.dtype, compute, arch)
    if plan.separate:
        projected, u = _project(g, b, c, norm, compute, need_ds, need_da)
        ds = projected if need_ds else ds
        outer = _sweep(g, s, None, c, eta, norm, "LR", None, None, plan) if need_db else None
    else:
        ds = torch.empty(M, R, device=s.device, dtype=compute) if need_ds else ds
        u = torch.empty(M, R, device=s.device, dtype=compute) if need_da and (apart or not need_ds) else ds
        projected = ds if need_ds else (u if need_da and not apart else None)
        scaled = u if need_da and apart else None
        outer = _sweep(g, s, b, c, eta, norm, "LR" if need_db else "", projected, scaled, plan)
    if need_db:
        db = combine(outer, dtype_b, scale_b)
    if need_da:
        # C[m] of "token" multiplies the rows of u, which the sweep does to its second operand.
        norm_a = norm if norm == "token" else None
        plan = plan_sweep(M, x.shape[1], R, norm_a, 0, True, x.dtype, compute, arch)
        outer = _sweep(x, u, None, c, eta, norm_a, "RL", None, None, plan)
        da = combine(outer, dtype_a, scale_a)
    return ds, da, db


def _project(
    g: Tensor, b: Tensor, c: Tensor | None, norm: str | None, dtype: torch.dtype, need_ds: bool, need_da: bool
) -> tuple[Tensor, Tensor]:
    """dS and u [M, R] by a pass of their own over g, which makes no partial sums; the same tensor where they are equal."""
    if norm != "row":
        ds = down_project(g, b.mT, dtype)
        return ds, ds
    factors = ([b.to(dtype)] if need_ds else []) + ([(c[:, None] * b).to(dtype)] if need_da else [])
    both = down_project(g, torch.cat(factors, dim=1).mT, dtype)
    if len(factors) == 1:
        return both, both
    ds, u = both.split(b.shape[1], dim=1)
    return ds.contiguous(), u
