"""The providers of the section "experts" as the passes they make over memory, where every expert has rows.

Counted by hand from the code of each, PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable

from .experts import ExpertCase
from .passes import Pass, Sizes


def _frozen(z: Sizes) -> list[Pass]:
    return [Pass("y = x W_eᵀ", z.x + z.w, z.y, z.gemm), Pass("dX = G W_e", z.y + z.w, z.x, z.gemm)]


def _adapter_grads(z: Sizes) -> list[Pass]:
    return [
        Pass("dS = G B_e", z.y + z.b, z.s, z.over_n),
        Pass("dB = Gᵀ S", z.y + z.s, z.b, z.over_n),
        Pass("dA = dSᵀ x", z.x + z.s, z.a, z.over_k),
    ]


def _ours(z: Sizes) -> list[Pass]:
    # Each expert's sum over its rows is in one piece in fp32 at least, which is written and read again.
    pieces = 4 // z.element
    case = z.case
    return [
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("y = x W_eᵀ + S B_eᵀ", z.x + z.w + z.s + z.b, z.y, z.gemm + z.over_n),
        Pass("C of every expert", z.a + z.b, 4 * z.adapters * case.N, 2.0 * z.adapters * case.R**2 * (case.K + case.N)),
        Pass("dS, u and dB from one sweep over G", z.y + z.s + z.b, 2 * z.s + pieces * z.b, 3 * z.over_n),
        Pass("the pieces of dB", pieces * z.b, z.b),
        Pass("dA from one sweep over x", z.x + z.s, pieces * z.a, z.over_k),
        Pass("the pieces of dA", pieces * z.a, z.a),
        Pass("dX = G W_e + dS A_e", z.y + z.w + z.s + z.a, z.x, z.gemm + z.over_k),
    ]


def _grouped_mm(z: Sizes) -> list[Pass]:
    y, dx = _frozen(z)
    return [
        y,
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("S B_eᵀ", z.s + z.b, z.y, z.over_n),
        Pass("+", 2 * z.y, z.y),
        dx,
        *_adapter_grads(z),
        Pass("dS A_e", z.s + z.a, z.x, z.over_k),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _peft(z: Sizes) -> list[Pass]:
    y, dx = _frozen(z)
    product = 2.0 * z.adapters * z.case.N * z.case.K * z.case.R
    return [
        Pass("W + BA of all experts", z.w + z.a + z.b, z.w, product),
        y,
        dx,
        Pass("dW = Gᵀ x of all experts", z.y + z.x, z.w, z.gemm),
        Pass("dB = dW Aᵀ", z.w + z.a, z.b, product),
        Pass("dA = Bᵀ dW", z.w + z.b, z.a, product),
    ]


_COUNTS: dict[str, Callable[[Sizes], list[Pass]]] = {
    "frozen": _frozen,
    "ours": _ours,
    "grouped-mm": _grouped_mm,
    "peft": _peft,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: all providers."""


def expert_passes(name: str, case: ExpertCase) -> list[Pass]:
    """The passes of forward and backward of `name` at `case`."""
    return _COUNTS[name](Sizes(case.layer, weights=case.E, adapters=case.E))
