"""The providers of the section "experts" as the passes they make over memory, where every expert has rows.

Counted by hand from the code of each, PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable

from .experts import ExpertCase
from .grouped import adapter_backward, frozen, ours_backward, ours_forward
from .passes import Pass, Sizes


def _ours(z: Sizes) -> list[Pass]:
    return [*ours_forward(z), *ours_backward(z)]


def _grouped_mm(z: Sizes) -> list[Pass]:
    y, dx = frozen(z)
    return [
        y,
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("S B_eᵀ", z.s + z.b, z.y, z.over_n),
        Pass("+", 2 * z.y, z.y),
        dx,
        *adapter_backward(z),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _peft(z: Sizes) -> list[Pass]:
    y, dx = frozen(z)
    product = 2.0 * z.adapters * z.case.N * z.case.K * z.case.R
    return [
        Pass("W + BA of all experts, as a parametrization is put on", z.w + z.a + z.b, z.w, product),
        Pass("W + BA of all experts", z.w + z.a + z.b, z.w, product),
        y,
        dx,
        Pass("dW = Gᵀ x of all experts", z.y + z.x, z.w, z.gemm),
        Pass("dB = dW Aᵀ", z.w + z.a, z.b, product),
        Pass("dA = Bᵀ dW", z.w + z.b, z.a, product),
    ]


_COUNTS: dict[str, Callable[[Sizes], list[Pass]]] = {
    "frozen": frozen,
    "ours": _ours,
    "grouped-mm": _grouped_mm,
    "peft": _peft,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: all providers."""


def expert_passes(name: str, case: ExpertCase) -> list[Pass]:
    """The passes of forward and backward of `name` at `case`."""
    return _COUNTS[name](Sizes(case.layer, weights=case.E, adapters=case.E))
