"""``dB = scale ⊙ Gᵀ S`` and ``dA = scale ⊙ uᵀ x`` in one launch, small enough to run beside the GEMM for dX."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .chain import Counted, join_chain, leave_chain, wait_for_counted
from .combine import combine_pair
from .configs import cdiv
from .launching import launch
from .sweep import Rule, empty_outer
from .tiling import TRITON_DTYPE, dot, dot_precision, in_steps, narrow, offsets, step_of


@triton.jit
def _outer_tile(
    v_ptr,
    u_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    under_way_ptr,
    pid_l,
    M,
    L,
    R,
    stride_vm,
    stride_vl,
    stride_um,
    stride_ur,
    stride_scale,
    stride_row_scale,
    stride_op,
    stride_ol,
    stride_or,
    SEGMENT_M,
    OUT_DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    U_IS_COUNTED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_L rows of ``out[p] = scale ⊙ Vᵀ U [L, R]`` over segment p, the program's second number; accumulated in fp32;
    R <= BLOCK_R. With counts scale and row_scale are from in front of the counted programs, and u is theirs where
    U_IS_COUNTED."""
    offs_l = offsets(pid_l * BLOCK_L, BLOCK_L)
    offs_r = offsets(0, BLOCK_R)
    mask_l = offs_l < L
    mask_r = offs_r < R
    start = tl.program_id(1) * SEGMENT_M
    stop = min(start + SEGMENT_M, M)
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    if U_IS_COUNTED or HAS_ROW_SCALE:
        wait_for_counted(under_way_ptr)
    for m in range(start, stop, BLOCK_M):
        offs_m = offsets(m, BLOCK_M)
        mask_m = offs_m < stop
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_l[None, :] * stride_vl
        u_ptrs = u_ptr + offs_m[:, None] * stride_um + offs_r[None, :] * stride_ur
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if HAS_ROW_SCALE:
            u = u * tl.load(row_scale_ptr + offs_m * stride_row_scale, mask=mask_m, other=0.0)[:, None]
        acc = dot(tl.trans(v), u, acc, DTYPE, PRECISION)
    if not (U_IS_COUNTED or HAS_ROW_SCALE):
        wait_for_counted(under_way_ptr)
    if SCALE == "columns":
        acc *= tl.load(scale_ptr + offs_l * stride_scale, mask=mask_l, other=0.0)[:, None]
    elif SCALE == "rank":
        acc *= tl.load(scale_ptr + offs_r * stride_scale, mask=mask_r, other=0.0)[None, :]
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * stride_op
    out_ptrs += offs_l[:, None] * stride_ol + offs_r[None, :] * stride_or
    tl.store(out_ptrs, narrow(acc, OUT_DTYPE), mask=mask_l[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "SEGMENT_M"])
def _outer_pair_kernel(
    g_ptr,
    s_ptr,
    x_ptr,
    u_ptr,
    scale_b_ptr,
    scale_a_ptr,
    row_scale_ptr,
    db_ptr,
    da_ptr,
    under_way_ptr,
    M,
    N,
    K,
    R,
    stride_gm,
    stride_gn,
    stride_sm,
    stride_sr,
    stride_xm,
    stride_xk,
    stride_um,
    stride_ur,
    stride_scale_b,
    stride_scale_a,
    stride_row_scale,
    stride_bp,
    stride_bn,
    stride_br,
    stride_ap,
    stride_ak,
    stride_ar,
    SEGMENT_M,
    CHAIN: tl.constexpr,
    DB_DTYPE: tl.constexpr,
    DA_DTYPE: tl.constexpr,
    SCALE_B: tl.constexpr,
    SCALE_A: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    U_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
):
    """``db[p] = scale_b ⊙ Gᵀ S`` and ``da[p] = scale_a ⊙ xᵀ u`` over segment p, SEGMENT_M rows; G [M, N], x [M, K], S and u
    [M, R], db [P, N, R], da [P, K, R], accumulated in fp32; R <= BLOCK_R.

    The first programs have BLOCK_L columns of G each, the rest of x; row_scale [M] multiplies S and u. With counts u is
    what counted programs write (`chain`).
    """
    join_chain(CHAIN)
    R, stride_sm, stride_um = in_steps(R, U_STEP), in_steps(stride_sm, U_STEP), in_steps(stride_um, U_STEP)
    stride_bn = in_steps(stride_bn, OUT_STEP)
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_L)
    if pid < tiles_n:
        _outer_tile(
            g_ptr,
            s_ptr,
            scale_b_ptr,
            row_scale_ptr,
            db_ptr,
            under_way_ptr,
            pid,
            M,
            N,
            R,
            stride_gm,
            stride_gn,
            stride_sm,
            stride_sr,
            stride_scale_b,
            stride_row_scale,
            stride_bp,
            stride_bn,
            stride_br,
            SEGMENT_M,
            DB_DTYPE,
            SCALE_B,
            HAS_ROW_SCALE,
            False,
            DTYPE,
            PRECISION,
            BLOCK_M,
            BLOCK_L,
            BLOCK_R,
        )
    else:
        _outer_tile(
            x_ptr,
            u_ptr,
            scale_a_ptr,
            row_scale_ptr,
            da_ptr,
            under_way_ptr,
            pid - tiles_n,
            M,
            K,
            R,
            stride_xm,
            stride_xk,
            stride_um,
            stride_ur,
            stride_scale_a,
            stride_row_scale,
            stride_ap,
            stride_ak,
            stride_ar,
            SEGMENT_M,
            DA_DTYPE,
            SCALE_A,
            HAS_ROW_SCALE,
            True,
            DTYPE,
            PRECISION,
            BLOCK_M,
            BLOCK_L,
            BLOCK_R,
        )
    leave_chain(CHAIN)


def pick_pair(N: int, K: int, R: int, dtype: torch.dtype, arch: str, compute: torch.dtype) -> configs.Config | None:
    """The configuration for these sizes; None where this architecture has none, or none for so large a rank."""
    return configs.whole_rank("outer_pair", N, K, R, dtype, arch, compute)


def outer_pair(
    g: Tensor,
    s: Tensor,
    rule_g: Rule,
    x: Tensor,
    u: Tensor,
    rule_x: Rule,
    config: configs.Config,
    dtypes: tuple[torch.dtype, torch.dtype],
    counted: Counted | None = None,
) -> tuple[Tensor, Tensor]:
    """What `add_up_pair` makes dA and dB of: sums ``[P, R, K]`` and ``[P, N, R]`` in fp32 over P segments of the rows; of one
    segment ``dA [R, K]`` and ``dB [N, R]`` themselves, in `dtypes`. M >= 1.

    g [M, N], s [M, R], x [M, K] and u [M, R] of any strides, s and u of one dtype; of the rules `scale` with its `axis`, and
    one `row_scale` for both. u may be what `counted` programs write.
    """
    (M, N), K, R = g.shape, x.shape[1], s.shape[1]
    programs = cdiv(N, config.BLOCK_N) + cdiv(K, config.BLOCK_N)
    parts = configs.num_splits(programs, M, 8 * config.BLOCK_M, configs.arch_of(g.device), waves=1)
    segment_m = cdiv(cdiv(M, parts), config.BLOCK_M) * config.BLOCK_M
    parts = cdiv(M, segment_m)
    if parts == 1:
        da, db = (g.new_empty(size, dtype=dtype) for size, dtype in zip(((R, K), (N, R)), dtypes))
        da_lr, db_lr = da.mT[None], db[None]
    else:
        db, db_lr = empty_outer(parts, N, R, "LR", g.device)
        da, da_lr = empty_outer(parts, K, R, "RL", g.device)
    scales = (rule_g.scale, rule_x.scale)
    launch(
        _outer_pair_kernel,
        (programs, parts),
        g,
        s,
        x,
        u,
        *scales,
        rule_g.row_scale,
        db,
        da,
        None if counted is None else counted.under_way,
        M,
        N,
        K,
        R,
        *g.stride(),
        *s.stride(),
        *x.stride(),
        *u.stride(),
        *(0 if scale is None else scale.stride(0) for scale in scales),
        0 if rule_g.row_scale is None else rule_g.row_scale.stride(0),
        *db_lr.stride(),
        *da_lr.stride(),
        segment_m,
        DB_DTYPE=TRITON_DTYPE[db.dtype],
        DA_DTYPE=TRITON_DTYPE[da.dtype],
        SCALE_B=rule_g.axis,
        SCALE_A=rule_x.axis,
        HAS_ROW_SCALE=rule_g.row_scale is not None,
        DTYPE=TRITON_DTYPE[s.dtype],
        PRECISION=dot_precision(s.dtype, g.dtype, s.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_L=config.BLOCK_N,
        BLOCK_R=config.BLOCK_R,
        U_STEP=step_of(R, s.stride(0), u.stride(0)),
        OUT_STEP=step_of(R),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return da, db


def add_up_pair(da: Tensor, db: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """``dA [R, K]`` and ``dB [N, R]`` in `dtypes` of what `outer_pair` gave, which was given the same."""
    return (da, db) if da.dim() == 2 else combine_pair(da, db, dtypes)
