"""Per-sample gradients: the sweeps of `adapter_grad` with the samples as segments.

Stage 1's output is the per-sample gradient itself, C included. Where only norms are wanted each program squares the sum
it has just made and keeps the sum of them all, so that one read of G gives dS, the ordinary dB and every sample's norm.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from . import batch_invariance, configs
from .adapter_grad import Sums, project, rules, sweep_chunks
from .combine import combine, combine_groups
from .configs import cdiv
from .down_project import down_project
from .outer_norms import outer_norms
from .segments import Segments
from .sweep import Cut, Rule, empty_outer, sweep
from .sweep_plan import plan_sweep, round_up, sums_over_columns


def _outer(
    v: Tensor, u: Tensor, f, rule: Rule, segments: Segments, config, layout, projected=None, scaled=None
) -> Tensor:
    """``scale ⊙ V~ᵀ U~`` of every sample in fp32, [b, L, R] for `layout` "LR" or [b, R, L] for "RL"."""
    L, R = v.shape[1], u.shape[1]
    cut = segments.cut(L, R, config, configs.arch_of(v.device))
    result, outer = empty_outer(cut.segments, L, R, layout, v.device)
    sweep(v, u, f, rule, cut, config, outer, projected=projected, scaled=scaled)
    if segments.is_cut(cut):
        result = combine_groups(result, segments.count, cut.parts, segments.first)
    return result


def _squares(
    v: Tensor, u: Tensor, f, rule: Rule, segments: Segments, config, layout, projected=None, scaled=None, *, dtypes
) -> tuple[Tensor, Tensor]:
    """The squared norm of every sample's ``scale ⊙ V~ᵀ U~`` [b] in fp32, and the sum of them all in its of `dtypes`."""
    (M, L), R, dtype = v.shape, u.shape[1], dtypes[layout]
    cut = segments.cut(L, R, config, configs.arch_of(v.device))
    if segments.is_cut(cut):
        # Pieces have to be added before they are squared. There are few samples then: their sums are small.
        sums = _outer(v, u, f, rule, segments, config, layout, projected, scaled)
        return sums.square().sum((1, 2)), combine(sums, dtype)
    # A tile would hold one row. Without the samples the sweep's tiles are full, and their norms take one more read of V.
    one_row = segments.longest == 1
    if one_row:
        count = configs.num_splits(cdiv(L, config.BLOCK_N), M, config.BLOCK_M, configs.arch_of(v.device))
        rows = round_up(cdiv(M, count), config.BLOCK_M)
        cut = Cut(cdiv(M, rows), 1, M, cdiv(M, rows), rows)
    tiles = cdiv(L, config.BLOCK_N) * cdiv(R, config.BLOCK_R)
    squares = None if one_row else torch.empty(segments.count, tiles, device=v.device, dtype=torch.float32)
    result, outer = empty_outer(cdiv(cut.segments, cut.per_program), L, R, layout, v.device)
    sweep(v, u, f, rule, cut, config, outer, squares, projected, scaled)
    squares = outer_norms(v, u, f, rule, segments) if one_row else squares.sum(dim=1)
    return squares, combine(result, dtype)


def fit(config: configs.Config, segments: Segments, norm: str | None, totals: bool) -> configs.Config:
    """Tiles no taller than the samples, and narrower where the registers are short: where a second sum, of all samples
    (`totals`), is kept beside the first, for "entry", where one stage already says so, and for the widest, which are
    made for tall tiles. Narrower than 64 takes more registers again."""
    rows = segments.block_rows(config)
    widest = rows < config.BLOCK_M and (config.BLOCK_N >= 512 or config.BLOCK_N * config.BLOCK_R >= 2**14)
    config = dataclasses.replace(config, BLOCK_M=rows, all_registers=True)
    if not totals and norm != "entry" and config.num_stages > 1 and not widest:
        return config
    width = config.BLOCK_N // (4 if norm == "entry" and totals else 2)
    return dataclasses.replace(config, BLOCK_N=max(width, min(64, config.BLOCK_N)), num_warps=8)


def _run(g, x, s, b, c, eta, norm, need_ds, need_da, need_db, segments, reduce, totals):
    """dS, u and what `reduce` (`_outer` or, with `totals`, `_squares`) makes of the two sweeps, None where not needed.

    M >= 1.
    """
    if need_ds and batch_invariance.enabled():
        _, *rest = _run(g, x, s, b, c, eta, norm, False, need_da, need_db, segments, reduce, totals)
        return down_project(g, b.mT, s.dtype), *rest
    (M, N), R = g.shape, s.shape[1]
    rule_g, rule_x = rules(s, b, c, eta, norm, x.shape[1] if need_da else 0)
    compute, arch = s.dtype, configs.arch_of(g.device)
    count = sums_over_columns(norm, need_ds, need_da)
    plan = plan_sweep(M, N, R, norm, count, need_db, g.dtype, compute, arch)
    config = fit(plan.config, segments, norm, totals)
    result_a = result_b = None
    # Samples do not end where chunks of rows do, so a G too long for one chunk has its sums over columns taken apart.
    if norm == "entry" and plan.chunk_rows < M:
        sums = Sums(s, norm, need_ds, need_da)
        sweep_chunks(g, s, b, rule_g, "", sums, plan)
        ds, u = sums.ds, sums.u
        if need_db:
            result_b = reduce(g, s, b, rule_g, segments, config, "LR")
    elif plan.separate or plan.chunk_rows < M:
        ds, u = project(g, b, c, norm, compute, need_da) if count else (s.new_empty(0),) * 2
        if need_db:
            result_b = reduce(g, s, b if norm == "entry" else None, rule_g, segments, config, "LR")
    else:
        sums = Sums(s, norm, need_ds, need_da)
        ds, u = sums.ds, sums.u
        tiles = cdiv(N, config.BLOCK_N)
        parts = torch.empty(len(sums.all), tiles, M, R, device=g.device, dtype=torch.float32)
        if need_db:
            result_b = reduce(g, s, b, rule_g, segments, config, "LR", **sums.shares(parts))
        elif len(parts):
            cut = segments.cut(N, R, config, arch)
            sweep(g, s, b, rule_g, cut, config, None, **sums.shares(parts))
        if len(parts):
            sums.add_up(parts)
    if need_da:
        config = plan_sweep(M, x.shape[1], R, None, 0, True, x.dtype, compute, arch).config
        config = fit(config, segments, None, totals)
        result_a = reduce(x, u, None, rule_x, segments, config, "RL")
    return ds, u, result_a, result_b


def sample_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    need_da: bool,
    need_db: bool,
    segments: Segments,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS [M, R], and of each sample dA [b, R, K] and dB [b, N, R] in fp32: `adapter_grads` of its rows, C included.

    Arguments as for `adapter_grads`; what is not needed is None. Samples without rows get zeros.
    """
    (M, N), R = g.shape, s.shape[1]
    if M == 0:
        zeros = {"device": s.device, "dtype": torch.float32}
        da = torch.zeros(segments.count, R, x.shape[1], **zeros) if need_da else None
        db = torch.zeros(segments.count, N, R, **zeros) if need_db else None
        return s.new_empty(0, R) if need_ds else None, da, db
    ds, _, da, db = _run(g, x, s, b, c, eta, norm, need_ds, need_da, need_db, segments, _outer, False)
    return ds if need_ds else None, da, db


def sample_squared_norms(
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
    segments: Segments,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dS, dA and dB as `adapter_grads` gives them, and the squared norm of each sample's dA and dB together, [b] in fp32.

    No per-sample gradient is kept. Arguments as for `adapter_grads`; what is not needed is None.
    """
    (M, N), R = g.shape, s.shape[1]
    if M == 0:
        da = None if dtype_a is None else s.new_zeros(R, x.shape[1], dtype=dtype_a)
        db = None if dtype_b is None else s.new_zeros(N, R, dtype=dtype_b)
        return s.new_empty(0, R) if need_ds else None, da, db, s.new_zeros(segments.count, dtype=torch.float32)
    reduce = functools.partial(_squares, dtypes={"RL": dtype_a, "LR": dtype_b})
    needs = (need_ds, dtype_a is not None, dtype_b is not None)
    ds, _, *results = _run(g, x, s, b, c, eta, norm, *needs, segments, reduce, True)
    squares = sum(result[0] for result in results if result is not None)
    da, db = (None if result is None else result[1] for result in results)
    return ds if need_ds else None, da, db, squares
