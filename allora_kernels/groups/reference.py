"""Groups of rows with factors (and a weight) each, in plain torch: `reference`, group by group.

Shapes: ``x [M, K]`` sorted by group, ``offsets [E]`` (where each group ends), ``weight [E, N, K]``, ``bias [E, N]``,
``lora_A [E, R, K]``, ``lora_B [E, N, R]``, ``s [M, R]``, ``g [M, N]``. Rows after the last end belong to no group and get
zeros. Where rows are not sorted, ``order [M]`` sorts them: row m of s is that of row ``order[m]`` of x, g and y.

`grouped_linear` and `multi_adapter_linear` leave every derivative to autograd; the steps, which the eager backend runs, write
them out, and each has a Triton kernel of the same name. All of them read `offsets` on the host.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import weight_coefficient

__all__ = [
    "grouped_adapter_grads",
    "grouped_down_project",
    "grouped_fused_linear",
    "grouped_linear",
    "multi_adapter_linear",
    "weight_coefficient",
]


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    for e, (start, stop) in enumerate(itertools.pairwise([0, *offsets.tolist()])):
        yield e, slice(start, stop)


def _rest(x: Tensor, offsets: Tensor) -> int:
    """How many rows belong to no group."""
    return x.shape[0] - int(offsets[-1])


def _in(order: Tensor | None, t: Tensor | None) -> Tensor | None:
    """`t` with its rows in this order."""
    return t if order is None or t is None else t[order]


def grouped_down_project(
    x: Tensor, lora_A: Tensor, offsets: Tensor, dtype: torch.dtype, order: Tensor | None = None
) -> Tensor:
    """``S = x A_eᵀ [M, R]`` in `dtype`."""
    x = _in(order, x)
    parts = [reference.down_project(x[rows], lora_A[e], dtype) for e, rows in _groups(offsets)]
    return torch.cat([*parts, x.new_zeros(_rest(x, offsets), lora_A.shape[1], dtype=dtype)])


def grouped_fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
) -> Tensor:
    """``y = x W_eᵀ + bias_e + S B_eᵀ [M, N]`` in x's dtype. With ``(g, Wᵀ, None, ds, Aᵀ, offsets)`` it is dX. A weight [N, K]
    and a bias [N] are those of every row, also of those in no group."""
    if weight.dim() == 2:
        y = F.linear(x, weight, bias)
        for e, rows in _groups(offsets):
            low_rank = (s[rows] @ lora_B[e].to(s.dtype).mT).to(x.dtype)
            own = rows if order is None else order[rows]
            y[own] += low_rank
        return y
    parts = [
        reference.fused_linear(x[rows], weight[e], None if bias is None else bias[e], s[rows], lora_B[e])
        for e, rows in _groups(offsets)
    ]
    return torch.cat([*parts, x.new_zeros(_rest(x, offsets), weight.shape[1])])


def grouped_adapter_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    offsets: Tensor,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    order: Tensor | None = None,
    inv_etas_squared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B_e [M, R]``, ``dA [E, R, K]`` and ``dB [E, N, R]``: `reference.adapter_grads` of each group's rows.

    c is `weight_coefficient` of the groups' factors; `inv_etas_squared` [E] stands for `eta`. What is not needed comes back
    empty.
    """
    g, x, found = _in(order, g), _in(order, x), []
    for e, rows in _groups(offsets):
        c_e = None if c is None else c[e]
        x_e = None if x is None else x[rows]
        eta_e = eta if inv_etas_squared is None else float(inv_etas_squared[e]) ** -0.5
        found.append(
            reference.adapter_grads(g[rows], x_e, s[rows], lora_B[e], c_e, eta_e, norm, need_ds, dtype_a, dtype_b)
        )
    ds, da, db = zip(*found)
    empty = s.new_empty(0)
    return (
        torch.cat([*ds, s.new_zeros(_rest(g, offsets), s.shape[1])]) if need_ds else empty,
        empty.clone() if dtype_a is None else torch.stack(da),
        empty.clone() if dtype_b is None else torch.stack(db),
    )


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    *,
    eta: float = 2.0,
    norm: str | None = "row",
) -> Tensor:
    """`reference.allora_linear` of each group's rows, differentiable in x, lora_A and lora_B."""
    parts = [
        reference.allora_linear(
            x[rows], weight[e], None if bias is None else bias[e], lora_A[e], lora_B[e], eta=eta, norm=norm
        )
        for e, rows in _groups(offsets)
    ]
    return torch.cat([*parts, x.new_zeros(_rest(x, offsets), weight.shape[1])])


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence, row_adapter: Tensor
) -> Tensor:
    """`reference.allora_linear` of the rows ``x [M, K]`` that name an adapter (``row_adapter [M]``, -1 for none), and
    ``x Wᵀ + bias`` of the others; each of `adapters` has lora_A, lora_B, eta and norm. Differentiable in x and the factors."""
    y = F.linear(x, weight, bias)
    for e, adapter in enumerate(adapters):
        rows = (row_adapter == e).nonzero()[:, 0]
        adapted = reference.allora_linear(
            x[rows], weight, bias, adapter.lora_A, adapter.lora_B, eta=adapter.eta, norm=adapter.norm
        )
        y = y.index_put((rows,), adapted)
    return y
