"""Per-sample gradients of adapters by group, as of the experts of a mixture: a segment is the rows of one sample in one group.

`pieces` says where each segment lies, so no program looks for its group. dS and u come from a pass of their own over G.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import batch_invariance, configs
from .adapter_grad import Sums, rules
from .combine import combine
from .configs import cdiv
from .grouped_adapter_grad import (
    GroupedRows,
    plan_groups,
    project_chunks,
    project_groups,
    token_coefficient_of_groups,
)
from .sample_grad import fit
from .segments import Segments
from .sweep import Cut, Rule, empty_outer, sweep
from .sweep_plan import plan_sweep, sums_over_columns

_MOST_PROGRAMS = 2**16 - 1
"""Of the second axis of a launch."""


def _per_program(groups: int, samples: int) -> int:
    """The fewest samples of a group that a program has to take one after the other, a divisor of them all."""
    divisors = (d for d in range(1, samples + 1) if samples % d == 0)
    return next(d for d in divisors if groups * (samples // d) <= _MOST_PROGRAMS or d == samples)


def _outer(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    rule: Rule,
    pieces: Tensor,
    samples: int,
    config: configs.Config,
    layout: str,
) -> Tensor:
    """``scale ⊙ V~ᵀ U~`` of every sample in every group in fp32, [samples, E, L, R] for `layout` "LR" or [samples, E, R, L]."""
    segments = pieces.shape[0] - 1
    groups = segments // samples
    result, outer = empty_outer(segments, v.shape[1], u.shape[1], layout, v.device)
    cut = Cut(segments, _per_program(groups, samples), 0, 1, 0, pieces, per_group=samples)
    sweep(v, u, f, rule, cut, config, outer)
    return result.view(samples, groups, *result.shape[1:])


def _squares(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    rule: Rule,
    pieces: Tensor,
    samples: int,
    config: configs.Config,
    layout: str,
    dtypes: dict[str, torch.dtype | None],
) -> tuple[Tensor, Tensor]:
    """The squared norm of what `_outer` gives of each sample [samples] in fp32, and its sum over the samples in its of
    `dtypes`: a program takes all samples of its group."""
    segments, L, R = pieces.shape[0] - 1, v.shape[1], u.shape[1]
    result, outer = empty_outer(segments // samples, L, R, layout, v.device)
    tiles = cdiv(L, config.BLOCK_N) * cdiv(R, config.BLOCK_R)
    squares = torch.empty(segments, tiles, device=v.device, dtype=torch.float32)
    cut = Cut(segments, samples, 0, 1, 0, pieces, per_group=samples)
    sweep(v, u, f, rule, cut, config, outer, squares)
    return squares.view(samples, -1).sum(dim=1), combine(result[None], dtypes[layout])


def _run(
    g, x, s, b, c, pieces, samples, eta, norm, need_ds, need_da, need_db, reduce: Callable, totals: bool
) -> tuple[Tensor | None, object, object]:
    """dS, and what `reduce` (`_outer` or, with `totals`, `_squares`) makes of the sweeps for dA and dB; None where not needed.

    M and samples >= 1.
    """
    (M, N), R, compute, arch = g.shape, s.shape[1], s.dtype, configs.arch_of(g.device)
    ends = pieces[samples::samples].contiguous()
    if norm == "token":
        c = token_coefficient_of_groups(s, b, ends, eta, None)
    rule_g, rule_x = rules(s, b, c, eta, norm, x.shape[1] if need_da else 0)
    ds = u = None
    if norm == "entry" and need_da:
        sums, due = Sums(s, norm, need_ds, need_da), sums_over_columns(norm, need_ds, need_da)
        plan = plan_groups(M, N, R, norm, due, False, g, compute)
        project_chunks(g, s, b, rule_g, GroupedRows(ends, None), plan, sums)
        ds, u = sums.ds, sums.u
    elif need_ds or need_da:
        ds, u = project_groups(g, b, c, ends, norm, compute, need_da)

    def of(v: Tensor, u: Tensor, f: Tensor | None, rule: Rule, layout: str):
        planned, width = batch_invariance.planned_rows(M), v.shape[1]
        config = plan_sweep(planned, width, R, rule.norm, 0, True, v.dtype, compute, arch).config
        # How many rows a segment has is not known here, and must not matter where bits may not depend on other rows.
        rows = 1 if batch_invariance.enabled() else cdiv(M, pieces.shape[0] - 1)
        config = fit(config, Segments(1, rows), rule.norm, totals)
        return reduce(v, u, f, rule, pieces, samples, config, layout)

    db = of(g, s, b if norm == "entry" else None, rule_g, "LR") if need_db else None
    da = of(x, u, None, rule_x, "RL") if need_da else None
    return ds if need_ds else None, da, db


def grouped_sample_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    pieces: Tensor,
    samples: int,
    eta: float,
    norm: str | None,
    need_ds: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS [M, R], and of each sample dA [samples, E, R, K] and dB [samples, E, N, R] in fp32: `adapter_grads` of its rows in
    each group, C included.

    Arguments as for `grouped_adapter_grads`; sample i of group e is the rows ``pieces[e * samples + i]`` to
    ``pieces[e * samples + i + 1]`` (int32 [E * samples + 1]), which may be none. What is not needed is None.
    """
    (M, N), (E, _, R) = g.shape, b.shape
    if M == 0 or samples == 0:
        zeros = {"device": s.device, "dtype": torch.float32}
        da = torch.zeros(samples, E, R, x.shape[1], **zeros) if need_da else None
        db = torch.zeros(samples, E, N, R, **zeros) if need_db else None
        return s.new_zeros(M, R) if need_ds else None, da, db
    return _run(g, x, s, b, c, pieces, samples, eta, norm, need_ds, need_da, need_db, _outer, False)


def grouped_sample_squared_norms(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    pieces: Tensor,
    samples: int,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dS, dA [E, R, K] and dB [E, N, R] as `grouped_adapter_grads` gives them, and the squared norm of each sample's gradient,
    all groups and both factors together, [samples] in fp32.

    No per-sample gradient is made. Arguments as for `grouped_sample_grads`; what is not needed is None.
    """
    (M, N), (E, _, R) = g.shape, b.shape
    if M == 0 or samples == 0:
        da = None if dtype_a is None else s.new_zeros(E, R, x.shape[1], dtype=dtype_a)
        db = None if dtype_b is None else s.new_zeros(E, N, R, dtype=dtype_b)
        return s.new_zeros(M, R) if need_ds else None, da, db, s.new_zeros(samples, dtype=torch.float32)
    reduce = functools.partial(_squares, dtypes={"RL": dtype_a, "LR": dtype_b})
    needs = (need_ds, dtype_a is not None, dtype_b is not None)
    ds, *results = _run(g, x, s, b, c, pieces, samples, eta, norm, *needs, reduce, True)
    squares = sum(result[0] for result in results if result is not None)
    da, db = (None if result is None else result[1] for result in results)
    return ds, da, db, squares
