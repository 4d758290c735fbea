"""The adapter's backward: one sweep over G and one over x, each in two deterministic stages.

Stage 1 cuts the rows into segments and writes, for each, its own ``dBᵀ``- or ``dA``-shaped sum; on the way the sweep
over G also yields ``dS = G B``, which dX needs. Stage 2 (`combine`) adds the segments in order. There are no atomics:
the same inputs give the same bits. With the samples as segments, stage 1 yields the per-sample gradients (`sample_grad`).
A rule of the coefficient C enters as what it multiplies:

    row     C[i] of G's column i: B's rows (for dA), and the sum's rows (for dB)
    matrix  one number: the sums for dA and dB
    factor  the rows of the sums for dA and dB
    token   C[m] of G's row m: S's rows (for dB) and dS's rows (for dA)
    entry   C[m,i]: the tile of G itself, from the tile of S Bᵀ recomputed beside it
"""

import torch
from torch import Tensor

from . import batch_invariance, configs
from .combine import combine, combine_groups
from .configs import cdiv
from .down_project import down_project, down_project_twice
from .row_norms import token_coefficient
from .sweep import Cut, Rule, empty_outer, sweep
from .sweep_plan import SCALES_COLUMNS, SweepPlan, plan_sweep, sums_over_columns, total_segments


def rules(s: Tensor, b: Tensor, c: Tensor | None, eta: float, norm: str | None, columns_of_x: int) -> tuple[Rule, Rule]:
    """What C multiplies in the sweep over G and in that over x [M, columns_of_x], for c from `weight_coefficient`; b and c may
    have groups in front."""
    N = b.shape[-2]
    if norm == "row":
        return Rule("row", c, "columns"), Rule()
    if norm == "matrix":
        return Rule(None, c.expand(*c.shape[:-1], N), "columns"), Rule(
            None, c.expand(*c.shape[:-1], columns_of_x), "columns"
        )
    if norm == "factor":
        return Rule(None, c[..., :N], "columns"), Rule(None, c[..., N:], "rank")
    if norm == "token":
        rule = Rule(row_scale=token_coefficient(s, b, eta) if c is None else c)
        return rule, rule
    return Rule("entry" if norm == "entry" else None, eta=eta), Rule()


def weighted(rule: Rule, row_weights: Tensor) -> Rule:
    """`rule` with each row of U times its weight [M] (fp32), too."""
    return rule._replace(row_scale=row_weights if rule.row_scale is None else rule.row_scale * row_weights)


def sweep_chunks(
    v: Tensor,
    u: Tensor,
    f: Tensor | None,
    rule: Rule,
    outer_layout: str,
    sums: "Sums | None",
    plan: SweepPlan,
) -> Tensor | None:
    """Both stages of the sums over v's columns, the first of those over its rows; v [M, L], M >= 1.

    Fills `sums`, where there are some. Returns the segments' sums of ``V~ᵀ U~`` in fp32:
    [P, L, R] for `outer_layout` "LR", [P, R, L] for "RL", None for "".
    """
    (M, L), R, config = v.shape, u.shape[1], plan.config
    # Every tile of columns has its own [rows, R] share of projected and scaled.
    tiles_l = cdiv(L, config.BLOCK_N)
    wanted = 0 if sums is None else len(sums.all)
    chunk_m, segment_m = plan.chunk_rows, plan.segment_rows
    segments = cdiv(min(M, chunk_m), segment_m)
    result = outer = None
    if outer_layout:
        result, outer = empty_outer(total_segments(M, chunk_m, segment_m), L, R, outer_layout, v.device)
    shares = torch.empty(wanted * tiles_l * min(M, chunk_m) * R, device=v.device, dtype=torch.float32)

    for chunk in range(cdiv(M, chunk_m)):
        rows = slice(chunk * chunk_m, min(M, (chunk + 1) * chunk_m))
        num_rows = rows.stop - rows.start
        # The same memory for every chunk, contiguous for its number of rows.
        parts = shares[: wanted * tiles_l * num_rows * R].view(wanted, tiles_l, num_rows, R)
        count = cdiv(num_rows, segment_m)
        sweep(
            v[rows],
            u[rows],
            f,
            rule if rule.row_scale is None else rule._replace(row_scale=rule.row_scale[rows]),
            Cut(count, 1, num_rows, count, segment_m),
            config,
            None if outer is None else outer[chunk * segments : (chunk + 1) * segments],
            **(sums.shares(parts) if wanted else {}),
        )
        if wanted:
            sums.add_up(parts, rows)
    return result


def project(
    g: Tensor, b: Tensor, c: Tensor | None, norm: str | None, dtype: torch.dtype, need_da: bool
) -> tuple[Tensor, Tensor]:
    """dS and u [M, R] by a pass of their own over g, which makes no partial sums; the same tensor where they are equal."""
    if norm == "row" and need_da:
        ds, u = down_project_twice(g, b.mT, c, dtype)
        return ds, u
    ds = down_project(g, b.mT, dtype)
    return ds, ds


class Sums:
    """The [M, R] sums over G's columns that are due, and where a sweep puts them: dS, and u = G~ B.

    Where C does not touch that sum u is dS, for "token" times C[m], which the sweep over x applies. `all` has one or both,
    `projected` and `scaled` the one that is the sweep's product of that name.
    """

    def __init__(self, s: Tensor, norm: str | None, need_ds: bool, need_da: bool) -> None:
        apart = norm in SCALES_COLUMNS
        another = need_da and (apart or not need_ds)
        self.all = s.new_empty(int(need_ds) + int(another), *s.shape)
        self.ds = self.all[0] if need_ds else s.new_empty(0)
        self.u = self.all[-1] if another else self.ds
        self.projected = self.ds if need_ds else (self.u if need_da and not apart else None)
        self.scaled = self.u if need_da and apart else None

    def shares(self, parts: Tensor) -> dict[str, Tensor]:
        """`sweep`'s arguments for the shares ``parts [sums, tiles, M, R]`` of `all`."""
        named = {"projected": (self.projected, 0), "scaled": (self.scaled, -1)}
        return {name: parts[place] for name, (wanted, place) in named.items() if wanted is not None}

    def add_up(self, parts: Tensor, rows: slice = slice(None)) -> None:
        """Those rows of `all`, from their shares ``[sums, tiles, rows, R]``."""
        if parts.shape[2] == self.all.shape[1]:
            combine_groups(parts.flatten(0, 1), len(parts), parts.shape[1], None, out=self.all)
            return
        for target, part in zip(self.all, parts):
            combine(part, target.dtype, out=target[rows])


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
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B [M, R]`` (s's dtype), ``dA = (g~ B)ᵀ x [R, K]`` and ``dB = g~ᵀ S [N, R]`` with ``g~ = C ⊙ g``.

    g [M, N], x [M, K], s [M, R] and b [N, R] of any strides; c as from `weight_coefficient` for the weight-dependent
    rules, for "token" [M] where b has only some of the layer's rows, else None. What is not needed (`need_ds` False, a
    dtype None) comes back empty; x may be None without dA. `row_weights` [M] (fp32) multiply the rows of g~: each the
    weight of its sample, they make dA and dB the weighted sum of the samples' gradients.
    """
    (M, N), R, need_da, need_db = g.shape, s.shape[1], dtype_a is not None, dtype_b is not None
    # Three tensors: an op's results may not share storage.
    ds, da, db = (s.new_empty(0) for _ in range(3))
    if M == 0:
        ds = s.new_empty(0, R) if need_ds else ds
        da = s.new_zeros(R, x.shape[1], dtype=dtype_a) if need_da else da
        db = s.new_zeros(N, R, dtype=dtype_b) if need_db else db
        return ds, da, db

    if need_ds and batch_invariance.enabled():
        # How a sweep is cut follows M, and the order of dS's sums with it.
        _, da, db = adapter_grads(g, x, s, b, c, eta, norm, False, dtype_a, dtype_b, row_weights)
        return down_project(g, b.mT, s.dtype), da, db

    rule_g, rule_x = rules(s, b, c, eta, norm, x.shape[1] if need_da else 0)
    if row_weights is not None:
        rule_g, rule_x = (weighted(rule, row_weights) for rule in (rule_g, rule_x))
    compute, arch = s.dtype, configs.arch_of(g.device)
    plan = plan_sweep(M, N, R, norm, sums_over_columns(norm, need_ds, need_da), need_db, g.dtype, compute, arch)
    layout = "LR" if need_db else ""
    if plan.separate:
        projected, u = project(g, b, c, norm, compute, need_da)
        ds = projected if need_ds else ds
        outer = sweep_chunks(g, s, None, rule_g, layout, None, plan) if need_db else None
    else:
        sums = Sums(s, norm, need_ds, need_da)
        ds, u = sums.ds, sums.u
        outer = sweep_chunks(g, s, b, rule_g, "" if plan.outer_apart else layout, sums, plan)
        if plan.outer_apart:
            alone = plan_sweep(M, N, R, norm, 0, True, g.dtype, compute, arch)
            outer = sweep_chunks(g, s, b, rule_g, layout, None, alone)
    if need_db:
        db = combine(outer, dtype_b)
    if need_da:
        plan = plan_sweep(M, x.shape[1], R, None, 0, True, x.dtype, compute, arch)
        da = combine(sweep_chunks(x, u, None, rule_x, "RL", None, plan), dtype_a)
    return ds, da, db
