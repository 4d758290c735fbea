"""The one kernel that sweeps G for dS and dB, and x for dA: sums over segments of rows, and over columns.

A segment is a run of rows: a share of all of them for the ordinary gradient, or a sample or a piece of a long one for
per-sample gradients. The kernel is the same; only where a segment starts and stops differs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import cdiv
from .groups import block_of, group_strides, group_tile, rows_at
from .launching import launch
from .tiling import TRITON_DTYPE, dot, dot_precision, entry_coefficient, in_steps, offsets, step_of


@triton.jit(do_not_specialize=["M", "SEGMENTS", "SAMPLE_M", "PARTS", "SEGMENT_M", "PER_GROUP"])
def _sweep_kernel(
    v_ptr,
    u_ptr,
    f_ptr,
    scale_ptr,
    row_scale_ptr,
    pieces_ptr,
    order_ptr,
    inv_etas_squared_ptr,
    outer_ptr,
    squares_ptr,
    projected_ptr,
    scaled_ptr,
    M,
    L,
    R,
    stride_vm,
    stride_vl,
    stride_um,
    stride_ur,
    stride_fg,
    stride_fl,
    stride_fr,
    stride_scale_g,
    stride_scale,
    stride_row_scale,
    stride_op,
    stride_ol,
    stride_or,
    SEGMENTS,
    PER_PROGRAM,
    SAMPLE_M,
    PARTS,
    SEGMENT_M,
    PER_GROUP,
    inv_eta_squared,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_ETAS: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTER: tl.constexpr,
    SQUARES: tl.constexpr,
    PROJECT: tl.constexpr,
    PROJECT_SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    U_STEP: tl.constexpr,
    F_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
):
    """``outer[p] = scale ⊙ V~ᵀ U~`` over segment p, ``projected = V F``, ``scaled = V~ F~``; V [M, L], U [M, R], F [L, R].

    One program owns PER_PROGRAM segments in a row, BLOCK_L columns of V and BLOCK_R of the rank: it writes their tiles
    of outer [P, L, R], or with SQUARES each tile's sum of squares [P, tiles] and the sum of them all; and its columns'
    share of projected and scaled [L/BLOCK_L, M, R]. Every tile of V is loaded once; accumulates in fp32. With GROUPS each
    segment is a piece of a group (`groups.group_tile`), which has its own F and scale, and its 1/η² with HAS_ETAS; with
    HAS_ORDER row m of U, projected and scaled is that of V's row order[m]. With IN_GROUPS a group has PER_GROUP segments in a
    row, the programs of which are its own; the sum of the i-th of group e is written at place ``i * groups + e``.
    """
    R, stride_um, stride_fl = in_steps(R, U_STEP), in_steps(stride_um, U_STEP), in_steps(stride_fl, F_STEP)
    stride_ol = in_steps(stride_ol, OUT_STEP)
    pid_l = tl.program_id(0)
    offs_l = offsets(pid_l * BLOCK_L, BLOCK_L)
    offs_r = offsets(tl.program_id(2) * BLOCK_R, BLOCK_R)
    mask_l = offs_l < L
    mask_r = offs_r < R
    if GROUPS > 0:
        group, group_start, group_stop = group_tile(tl.program_id(1), pieces_ptr, M, SEGMENT_M, GROUPS, BLOCK_E)
        if group_start >= group_stop:
            return
        # What belongs to no group is read as zeros, and so are its factors; its sums over rows are not written.
        mask_l = mask_l & (group < GROUPS)
        group = tl.minimum(group, GROUPS - 1).to(tl.int64)
    if IN_GROUPS:
        group = (tl.program_id(1) * PER_PROGRAM // PER_GROUP).to(tl.int64)
    if GROUPS > 0 or IN_GROUPS:
        if PROJECT or PROJECT_SCALED or NORM == "entry":
            f_ptr += group * stride_fg
        if SCALE != "" or NORM == "row":
            scale_ptr += group * stride_scale_g
        if HAS_ETAS:
            inv_eta_squared = tl.load(inv_etas_squared_ptr + group)
    if PROJECT or PROJECT_SCALED:
        f_ptrs = f_ptr + offs_l[:, None] * stride_fl + offs_r[None, :] * stride_fr
        f = tl.load(f_ptrs, mask=mask_l[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_L, BLOCK_R]
        f_scaled = f
        if NORM == "row":
            f_scaled = f * tl.load(scale_ptr + offs_l * stride_scale, mask=mask_l, other=0.0)[:, None]

    first = tl.program_id(1) * PER_PROGRAM
    mask_lr = mask_l[:, None] & mask_r[None, :]
    tile_ptrs = offs_l[:, None] * stride_ol + offs_r[None, :] * stride_or
    total = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    # With one segment a program PER_PROGRAM is a constant, and this is no loop.
    for i in range(0, PER_PROGRAM):
        segment = first + i
        exists = segment < SEGMENTS
        if GROUPS > 0:
            start, stop = group_start, tl.minimum(group_start + SEGMENT_M, group_stop)
        elif HAS_PIECES:
            start = tl.load(pieces_ptr + segment, mask=exists, other=0)
            stop = tl.load(pieces_ptr + segment + 1, mask=exists, other=0)
        else:
            sample_start = (segment // PARTS) * SAMPLE_M
            start = sample_start + (segment % PARTS) * SEGMENT_M
            stop = min(min(start + SEGMENT_M, sample_start + SAMPLE_M), M)
        acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        for m in range(start, stop, BLOCK_M):
            offs_m = offsets(m, BLOCK_M)
            mask_m = offs_m < stop
            rows = rows_at(order_ptr, offs_m, mask_m, HAS_ORDER)
            v_ptrs = v_ptr + rows[:, None] * stride_vm + offs_l[None, :] * stride_vl
            v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
            v_scaled = v
            if NORM == "entry":
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
                v_scaled = v * c

            projected_ptrs = (pid_l.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
            mask_mr = mask_m[:, None] & mask_r[None, :]
            zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            if PROJECT:
                tl.store(projected_ptr + projected_ptrs, dot(v, f, zeros, DTYPE, PRECISION), mask=mask_mr)
            if PROJECT_SCALED:
                share = dot(v_scaled, f_scaled, zeros, DTYPE, PRECISION)
                tl.store(scaled_ptr + projected_ptrs, share, mask=mask_mr)
            if OUTER:
                u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
                u = tl.load(u_ptrs, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
                if HAS_ROW_SCALE:
                    u = u * tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)[:, None]
                acc = dot(tl.trans(v_scaled), u, acc, DTYPE, PRECISION)
        if OUTER:
            # Loaded where it is used: kept through the loop it would fill the registers.
            if SCALE == "columns":
                acc *= tl.load(scale_ptr + offs_l * stride_scale, mask=mask_l, other=0.0)[:, None]
            elif SCALE == "rank":
                acc *= tl.load(scale_ptr + offs_r * stride_scale, mask=mask_r, other=0.0)[None, :]
            offset = segment + tl.full((), 0, tl.int64)
            if IN_GROUPS:
                offset = (offset % PER_GROUP) * (SEGMENTS // PER_GROUP) + offset // PER_GROUP
            if SQUARES:
                tile = tl.program_id(2) * tl.num_programs(0) + pid_l
                square_ptr = squares_ptr + offset * (tl.num_programs(0) * tl.num_programs(2)) + tile
                tl.store(square_ptr, tl.sum(acc * acc), mask=exists)
                total += acc
            else:
                # Triton 3.9's interpreter takes no mask that a scalar was spread over, so the segment is spread instead.
                exists_l = tl.zeros_like(offs_l) + segment < SEGMENTS
                tl.store(outer_ptr + offset * stride_op + tile_ptrs, acc, mask=mask_lr & exists_l[:, None])
    if SQUARES:
        tl.store(outer_ptr + tl.program_id(1).to(tl.int64) * stride_op + tile_ptrs, total, mask=mask_lr)


class Cut(NamedTuple):
    """The segments of one launch: `segments` of them, `per_program` to a program. Segment p starts at ``pieces[p]`` and
    stops at ``pieces[p + 1]`` (int32), or lies in sample ``p // parts`` of `sample_rows` rows, `segment_rows` of it. With
    `ends` [E] (int32) segment p is the p-th piece of `segment_rows` rows of the groups that end there, if there are so many;
    the rows are v's in this `order` [M] (int32), None where they lie in it. With `per_group` (and `pieces`) segment p is of
    group ``p // per_group``, and `per_program` divides it; 0 where there are no such groups."""

    segments: int
    per_program: int
    sample_rows: int
    parts: int
    segment_rows: int
    pieces: Tensor | None = None
    ends: Tensor | None = None
    order: Tensor | None = None
    per_group: int = 0


class Rule(NamedTuple):
    """What the coefficient multiplies: `norm` is "entry" for a factor of V's tile, "row" where `scale` also multiplies
    F's rows; `scale` of the sum over rows runs over `axis` "columns" (of V) or "rank"; `row_scale` [M] multiplies U's rows.
    `inv_etas_squared` [E] (fp32) has every group's 1/η² where `eta` is not that of all."""

    norm: str | None = None
    scale: Tensor | None = None
    axis: str = ""
    row_scale: Tensor | None = None
    eta: float = 1.0
    inv_etas_squared: Tensor | None = None


def sweep(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    rule: Rule,
    cut: Cut,
    config: configs.Config,
    outer: Tensor | None,
    squares: Tensor | None = None,
    projected: Tensor | None = None,
    scaled: Tensor | None = None,
) -> None:
    """One launch of the kernel on v [M, L] and u [M, R] of any strides: fills `outer` [P, L, R] (with `squares` a sum a
    program), `squares` [P, tiles], and the shares `projected` and `scaled` [tiles of L, M, R], where they are given. Where
    groups are cut f is [E, L, R], and the rule's scale [E, L] or [E, R]; u has a row for each of the order's."""
    (M, R), L = u.shape, v.shape[1]
    tiles_l, tiles_r = cdiv(L, config.BLOCK_N), cdiv(R, config.BLOCK_R)
    groups = 0 if cut.ends is None else cut.ends.shape[0]
    launch(
        _sweep_kernel,
        (tiles_l, cdiv(cut.segments, cut.per_program), tiles_r),
        v,
        u,
        f,
        rule.scale,
        rule.row_scale,
        cut.pieces if cut.ends is None else cut.ends,
        cut.order,
        rule.inv_etas_squared,
        outer,
        squares,
        projected,
        scaled,
        M,
        L,
        R,
        *v.stride(),
        *u.stride(),
        *group_strides(f),
        *group_strides(rule.scale, 1),
        0 if rule.row_scale is None else rule.row_scale.stride(0),
        *((0, 0, 0) if outer is None else outer.stride()),
        cut.segments,
        cut.per_program,
        cut.sample_rows,
        cut.parts,
        cut.segment_rows,
        cut.per_group,
        rule.eta**-2,
        NORM=rule.norm,
        SCALE=rule.axis,
        HAS_ROW_SCALE=rule.row_scale is not None,
        HAS_PIECES=cut.pieces is not None,
        IN_GROUPS=cut.per_group > 0,
        HAS_ORDER=cut.order is not None,
        HAS_ETAS=rule.inv_etas_squared is not None,
        GROUPS=groups,
        OUTER=outer is not None,
        SQUARES=squares is not None,
        PROJECT=projected is not None,
        PROJECT_SCALED=scaled is not None,
        DTYPE=TRITON_DTYPE[u.dtype],
        PRECISION=dot_precision(u.dtype, v.dtype, u.dtype),
        BLOCK_E=block_of(groups),
        BLOCK_M=config.BLOCK_M,
        BLOCK_L=config.BLOCK_N,
        BLOCK_R=config.BLOCK_R,
        U_STEP=step_of(R, u.stride(0)),
        F_STEP=1 if f is None else step_of(f.stride(-2)),
        OUT_STEP=1 if outer is None else step_of(outer.stride(1)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(configs.all_registers(configs.arch_of(v.device)) if config.all_registers else {}),
    )


def empty_outer(count: int, L: int, R: int, layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """An fp32 tensor of `count` sums, [P, L, R] for `layout` "LR" or [P, R, L] for "RL", and its view as [P, L, R]."""
    shape = (L, R) if layout == "LR" else (R, L)
    outer = torch.empty(count, *shape, device=device, dtype=torch.float32)
    return outer, outer if layout == "LR" else outer.mT
