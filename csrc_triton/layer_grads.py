"""The layer's whole backward pass: dX, dA and dB, where all are asked for.

dX waits for nothing but dS. So where the GPU can run a small kernel beside the persistent GEMM, one pass over G takes dS and
u = G~ B, and the sums for dB and dA, each a pass of its own over G and over x, run while the GEMM for dX does (`outer_pair`).
Elsewhere the steps follow one another, with dB and dS from one read of G (`adapter_grads`).
"""

import torch
from torch import Tensor

from . import batch_invariance, configs, plans
from .adapter_grad import adapter_grads, project, rules
from .chain import chained
from .fused_linear import fused_linear, launch_persistently
from .fused_linear_persistent import describable
from .outer_pair import add_up_pair, outer_pair, pick_pair
from .row_norms import weight_coefficient


def pick_apart(
    N: int, K: int, R: int, norm: str | None, dtype: torch.dtype, arch: str, compute: torch.dtype
) -> configs.Config | None:
    """The configuration of the sums for dB and dA where they are taken apart from dS; None where step follows step."""
    if norm == "entry" or batch_invariance.enabled():
        return None
    return pick_pair(N, K, R, dtype, arch, compute)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``dX = g W + dS A [M, K]`` with ``dS = g B``, ``dA = (g~ B)ᵀ x [R, K]`` and ``dB = g~ᵀ S [N, R]`` with ``g~ = C ⊙ g``.

    g [M, N], x [M, K], s [M, R], weight [N, K], a [R, K] and b [N, R] of any strides; C by `norm` and `eta`; c where
    `weight_coefficient` has been called already.
    """
    (M, N), K, R = g.shape, x.shape[1], s.shape[1]
    pair = pick_apart(N, K, R, norm, g.dtype, configs.arch_of(g.device), s.dtype)
    apart = M > 0 and pair is not None
    can_overlap = configs.can_overlap(g.device)
    with chained(apart and can_overlap):
        if c is None and norm in ("row", "matrix", "factor"):
            c = weight_coefficient(a, b, eta, norm)
        if apart:
            ds, u = project(g, b, c, norm, s.dtype, need_da=True)
    if not apart:
        ds, da, db = adapter_grads(g, x, s, b, c, eta, norm, True, dtype_a, dtype_b)
        return fused_linear(g, weight.mT, None, ds, a.mT), da, db

    call = plans.Call("layer_grads", M, K, N, R, g.dtype, s.dtype)
    plan = plans.pick(call, g.device, describable(g, weight.mT, a.mT, ds))
    overlap = plan.way in plans.PERSISTENT and can_overlap
    rule_g, rule_x = rules(s, b, c, eta, norm, K)
    if not overlap:
        sums = outer_pair(g, s, rule_g, x, u, rule_x, pair, (dtype_a, dtype_b))
        dx = fused_linear(g, weight.mT, None, ds, a.mT, plan)
        return dx, *add_up_pair(*sums, (dtype_a, dtype_b))

    dx = torch.empty(M, K, device=g.device, dtype=g.dtype)
    # Another chain, because what both read has to be there when its first kernel begins. The GEMM is that: it takes its place
    # on every multiprocessor, and the small programs what room is left, however many they are.
    with chained(True, *("midway",) * plans.takes_parts(plan.way, g.dtype, s.dtype), "late"):
        held = launch_persistently(g, weight.mT, None, ds, a.mT, dx, plan, beside=True)
        sums = outer_pair(g, s, rule_g, x, u, rule_x, pair, (dtype_a, dtype_b))
        del held
    return dx, *add_up_pair(*sums, (dtype_a, dtype_b))
