"""The layer's whole backward pass: dX, dA and dB, where all are asked for.

dX waits for nothing but dS, and for that only at the end of a tile. So where the GPU can run a small kernel beside the
persistent GEMM, one pass over G for dS and u = G~ B begins, then the GEMM, which takes its place on every multiprocessor, and
in the room that is left as that pass ends, the sums for dB and dA, each a pass of its own over G and over x (`outer_pair`),
however many their programs are. Where that pass has no room there it ends first. Elsewhere the steps follow one another, with
dB and dS from one read of G (`adapter_grads`).
"""

import torch
from torch import Tensor

from . import batch_invariance, configs, plans
from .adapter_grad import adapter_grads, project, rules
from .beside import Beside, counted, room
from .chain import chained, counts
from .configs import cdiv
from .down_project import down_project_beside
from .fused_linear import fused_linear, launch_by_plan
from .fused_linear_persistent import describable
from .outer_pair import add_up_pair, outer_pair, pick_pair
from .row_norms import WEIGHT_NORMS, weight_coefficient


def pick_apart(call: plans.LayerCall, arch: str) -> configs.Config | None:
    """The configuration of the sums for dB and dA where they are taken apart from dS; None where step follows step."""
    if call.norm == "entry" or batch_invariance.enabled():
        return None
    return pick_pair(call.N, call.K, call.R, call.dtype, arch, call.low_rank_dtype)


def room_for_ds(plan: plans.Plan, call: plans.LayerCall, device: torch.device) -> Beside | None:
    """How the pass over G [M, N] for dS and u runs beside the GEMM of `plan` for dX [M, K]; None where it does not. The GEMM
    has more tiles than fit the chip at once: else the first, which waits for dS, is the last."""
    M, N, K, R, norm, dtype, low_rank_dtype = call
    beside = room(plan, M, N, R, dtype, low_rank_dtype, device, products=2 if norm == "row" else 1)
    if beside is None or not plans.pays_beside(M, N, beside.config.BLOCK_M, dtype, configs.arch_of(device)):
        return None
    tiles = cdiv(M, plan.config.BLOCK_M) * cdiv(K, plan.config.BLOCK_N)
    return beside if tiles > configs.num_sms(device) else None


def layer_grads(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    eta: float,
    norm: str | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    c: Tensor | None = None,
    plan: plans.Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dX = g W + dS A [M, K]`` with ``dS = g B``, ``dA = (g~ B)ᵀ x [R, K]`` and ``dB = g~ᵀ S [N, R]`` with ``g~ = C ⊙ g``.

    g [M, N], x [M, K], s [M, R], weight [N, K], a [R, K] and b [N, R] of any strides; C by `norm` and `eta`; c where
    `weight_coefficient` has been called already. `plan` is of dX, chosen where none is given.
    """
    (M, N), K, R = g.shape, x.shape[1], s.shape[1]
    call = plans.LayerCall(M, N, K, R, norm, g.dtype, s.dtype)
    can_overlap, dtypes = configs.can_overlap(g.device), (dtype_a, dtype_b)
    pair = pick_apart(call, configs.arch_of(g.device))
    if M == 0 or pair is None:
        c = _coefficient(a, b, eta, norm) if c is None else c
        ds, da, db = adapter_grads(g, x, s, b, c, eta, norm, True, dtype_a, dtype_b)
        return fused_linear(g, weight.mT, None, ds, a.mT), da, db

    if plan is None or (plan.way == "column" and counts(g.device) is None):
        plan = plans.pick(call.dx, g.device, describable(g, weight.mT, a.mT))
    by_column, overlap = plan.way == "column", plan.way in plans.PERSISTENT and can_overlap
    beside = counted(room_for_ds(plan, call, g.device), g.device)
    with chained(can_overlap):
        c = _coefficient(a, b, eta, norm) if c is None else c
        rule_g, rule_x = rules(s, b, c, eta, norm, K)
        if beside is None and not by_column:
            ds, u = project(g, b, c, norm, s.dtype, need_da=True)
    if by_column:
        # Here, as a Triton may have another Gluon (`plans.options`).
        from .layer_grads_pipelined import layer_grads_pipelined

        c = c if norm == "row" else None
        return layer_grads_pipelined(
            *(g, x, s, weight, a, b, c, (rule_g, rule_x)), plan.config, pair, dtypes, counts(g.device)
        )
    if not overlap:
        sums = outer_pair(g, s, rule_g, x, u, rule_x, pair, dtypes)
        return fused_linear(g, weight.mT, None, ds, a.mT, plan), *add_up_pair(*sums, dtypes)

    dx = torch.empty(M, K, device=g.device, dtype=g.dtype)
    in_front = beside is not None or plans.takes_parts(plan.way, g.dtype, s.dtype)
    # Another chain, because what all read has to be there when its first kernel begins, and because the pass for dS gets each
    # multiprocessor one program only where nothing else stands.
    with chained(True, *("midway",) * in_front, "late"):
        under_way = awaited = None
        if beside is not None:
            under_way, awaited = beside.counted, beside.awaited
            ds_and_u = down_project_beside(g, b.mT, c if norm == "row" else None, s.dtype, beside)
            ds, u = ds_and_u[0], ds_and_u[-1]
        held = launch_by_plan(g, weight.mT, None, ds, a.mT, dx, plan, beside=True, counted=awaited)
        sums = outer_pair(g, s, rule_g, x, u, rule_x, pair, dtypes, under_way)
        del held
    return dx, *add_up_pair(*sums, dtypes)


def _coefficient(a: Tensor, b: Tensor, eta: float, norm: str | None) -> Tensor | None:
    return weight_coefficient(a, b, eta, norm) if norm in WEIGHT_NORMS else None
