"""The backward pass of adapters by group: the sweeps of `adapter_grad`, a segment being a piece of a group.

Stage 1 reads each group's factor and coefficient, stage 2 adds the pieces of a group in order. A group without rows gets zeros.
Under batch invariance a group's gradients have the same bits whatever the other groups' rows are: how it is cut follows no M.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from . import batch_invariance, configs
from .adapter_grad import Sums, rules, weighted
from .combine import combine_groups
from .configs import cdiv
from .grouped_down_project import grouped_down_project, grouped_down_project_twice
from .groups import first_pieces, most_tiles
from .row_norms import gram_parts
from .sweep import Cut, Rule, empty_outer, sweep
from .sweep_plan import SweepPlan, plan_sweep, sums_over_columns


class GroupedRows(NamedTuple):
    """Where rows lie: `ends` [E] and `order` [M] as in `groups`."""

    ends: Tensor
    order: Tensor | None

    def part(self, start: int, stop: int) -> "GroupedRows":
        """The groups as they lie in the rows from `start` to `stop`."""
        order = None if self.order is None else self.order[start:stop]
        return GroupedRows((self.ends - start).clamp(0, stop - start), order)

    def cut(self, M: int, rows: int) -> Cut:
        """M rows in pieces of `rows` rows."""
        return Cut(most_tiles(M, self.ends.shape[0], rows), 1, 0, 1, rows, ends=self.ends, order=self.order)


def token_coefficient_of_groups(
    s: Tensor, b: Tensor, ends: Tensor, eta: float, inv_etas_squared: Tensor | None
) -> Tensor:
    """C [M] in fp32 of the rule "token", for s [M, R] and b [E, N, R]."""
    gram = gram_parts(b.mT).sum(dim=1)
    square = (grouped_down_project(s, gram, ends, torch.float32) * s).sum(dim=1)
    inv_eta_squared = eta**-2
    if inv_etas_squared is not None:
        places = torch.arange(s.shape[0], device=s.device, dtype=torch.int32)
        groups = torch.searchsorted(ends, places, right=True).clamp_max(ends.shape[0] - 1)
        inv_eta_squared = inv_etas_squared[groups]
    return 1 / torch.sqrt(square.clamp_min(0).sqrt() + inv_eta_squared)


def plan_groups(
    M: int, L: int, R: int, norm: str | None, sums: int, outer: bool, v: Tensor, compute: torch.dtype
) -> SweepPlan:
    """`plan_sweep`, with all registers and at most 256 columns: finding a group and its factors takes registers of its own. So
    do two sums over columns beside the widest tiles, which are then made apart."""
    rows = batch_invariance.planned_rows(M)
    plan = plan_sweep(rows, L, R, norm, sums, outer, v.dtype, compute, configs.arch_of(v.device))
    config = dataclasses.replace(plan.config, all_registers=True, BLOCK_N=min(plan.config.BLOCK_N, 256))
    # The tile of S Bᵀ stands beside G's.
    config = dataclasses.replace(config, num_warps=8) if norm == "entry" and config.num_stages == 1 else config
    columns = config.BLOCK_N * config.BLOCK_R // (1 if compute == torch.float32 else 4)
    narrow_loads = R % 16 != 0 and compute == torch.float32 and configs.arch_of(v.device) != "interpreter"
    config = dataclasses.replace(config, num_warps=8) if narrow_loads else config
    wide = (config.BLOCK_M >= 64 and columns >= 2**12) or narrow_loads
    separate = plan.separate or (norm == "row" and sums == 2 and wide)
    return dataclasses.replace(plan, config=config, separate=separate)


def project_groups(
    g: Tensor,
    b: Tensor,
    c: Tensor | None,
    ends: Tensor,
    norm: str | None,
    dtype: torch.dtype,
    need_da: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`project` of every group's rows, b [E, N, R] and c [E, N]."""
    if norm == "row" and need_da:
        ds, u = grouped_down_project_twice(g, b.mT, c, ends, dtype, order)
        return ds, u
    ds = grouped_down_project(g, b.mT, ends, dtype, order)
    return ds, ds


def _outer(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    rule: Rule,
    groups: GroupedRows,
    plan: SweepPlan,
    layout: str,
    dtype,
    **shares,
) -> Tensor:
    """``scale ⊙ V~ᵀ U~`` of every group in `dtype`, [E, L, R] for `layout` "LR" or [E, R, L] for "RL"."""
    (M, L), R = v.shape, u.shape[1]
    cut = groups.cut(M, plan.segment_rows)
    result, outer = empty_outer(cut.segments, L, R, layout, v.device)
    sweep(v, u, f, rule, cut, plan.config, outer, **shares)
    first = first_pieces(groups.ends, M, plan.segment_rows)
    return combine_groups(result, groups.ends.shape[0], 0, first, dtype)


def _parts(M: int, L: int, R: int, sums: Sums, plan: SweepPlan, device: torch.device) -> Tensor:
    """Room for each block of columns of V [M, L] to put its part of the `sums` that are due."""
    return torch.empty(len(sums.all), cdiv(L, plan.config.BLOCK_N), M, R, device=device, dtype=torch.float32)


def project_chunks(
    g: Tensor, s: Tensor, b: Tensor, rule: Rule, groups: GroupedRows, plan: SweepPlan, sums: Sums
) -> None:
    """Fills `sums`, some rows of the groups after the others."""
    (M, L), R = g.shape, s.shape[1]
    for start in range(0, M, plan.chunk_rows):
        rows = slice(start, min(M, start + plan.chunk_rows))
        count = rows.stop - start
        parts = _parts(count, L, R, sums, plan, g.device)
        cut = groups.part(start, rows.stop).cut(count, plan.segment_rows)
        chunk_rule = rule if rule.row_scale is None else rule._replace(row_scale=rule.row_scale[rows])
        v = g[rows] if groups.order is None else g
        sweep(v, s[rows], b, chunk_rule, cut, plan.config, None, **sums.shares(parts))
        sums.add_up(parts, rows)


def grouped_adapter_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    ends: Tensor,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    order: Tensor | None = None,
    inv_etas_squared: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B_e [M, R]``, and every group's ``dA [E, R, K]`` and ``dB [E, N, R]``: `adapter_grads` of its rows.

    g [M, N], x [M, K], s [M, R] and b [E, N, R] of any strides, c as from `weight_coefficient` of the groups' factors,
    ends [E] (int32). What is not needed (`need_ds` False, a dtype None) comes back empty; x may be None without dA. With
    `order` [M] (int32) row m of s and dS is that of row order[m] of g and x; `inv_etas_squared` [E] (fp32) stands for `eta`;
    `row_weights` [M] (fp32) multiply the rows of g~ as they lie in s.
    """
    (M, N), (E, _, R) = g.shape, b.shape
    need_da, need_db = dtype_a is not None, dtype_b is not None
    ds, da, db = (s.new_empty(0) for _ in range(3))
    if M == 0:
        ds = s.new_empty(0, R) if need_ds else ds
        da = s.new_zeros(E, R, x.shape[1], dtype=dtype_a) if need_da else da
        db = s.new_zeros(E, N, R, dtype=dtype_b) if need_db else db
        return ds, da, db
    invariant = batch_invariance.enabled()
    if need_ds and invariant:
        rest = (False, dtype_a, dtype_b, order, inv_etas_squared, row_weights)
        _, da, db = grouped_adapter_grads(g, x, s, b, c, ends, eta, norm, *rest)
        return grouped_down_project(g, b.mT, ends, s.dtype, order), da, db

    if norm == "token":
        c = token_coefficient_of_groups(s, b, ends, eta, inv_etas_squared)
    rule_g, rule_x = rules(s, b, c, eta, norm, x.shape[1] if need_da else 0)
    rule_g = rule_g._replace(inv_etas_squared=inv_etas_squared if norm == "entry" else None)
    if row_weights is not None:
        rule_g, rule_x = (weighted(rule, row_weights) for rule in (rule_g, rule_x))
    compute, groups = s.dtype, GroupedRows(ends, order)
    sums_due = sums_over_columns(norm, need_ds, need_da)
    plan = plan_groups(M, N, R, norm, sums_due, need_db, g, compute)
    f, parts, shares = b if norm == "entry" else None, None, {}
    chunked = plan.outer_apart or plan.chunk_rows < M
    if sums_due and norm != "entry" and (plan.separate or chunked or invariant):
        projected, u = project_groups(g, b, c, ends, norm, compute, need_da, order)
        ds = projected if need_ds else ds
    else:
        sums = Sums(s, norm, need_ds, need_da)
        ds, u = sums.ds, sums.u
        if sums_due and (chunked or not need_db):
            project_chunks(g, s, b, rule_g, groups, plan, sums)
        elif sums_due:
            f, parts = b, _parts(M, N, R, sums, plan, g.device)
            shares = sums.shares(parts)
    if need_db:
        if plan.outer_apart:
            plan = plan_groups(M, N, R, norm, 0, True, g, compute)
        db = _outer(g, s, f, rule_g, groups, plan, "LR", dtype_b, **shares)
        if parts is not None:
            sums.add_up(parts)
    if need_da:
        plan = plan_groups(M, x.shape[1], R, None, 0, True, x, compute)
        da = _outer(x, u, None, rule_x, groups, plan, "RL", dtype_a)
    return ds, da, db
