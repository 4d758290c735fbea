"""The providers of the section "adapters" as the passes they make over memory.

Counted by hand from the code of each, PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable

from .adapters import AdaptersCase
from .passes import Pass, Sizes


def _frozen(z: Sizes) -> list[Pass]:
    return [Pass("y = x Wᵀ", z.x + z.w, z.y, z.gemm), Pass("dX = G W", z.y + z.w, z.x, z.gemm)]


def _ours(z: Sizes) -> list[Pass]:
    # Each adapter's sum over its rows is in one piece in fp32 at least, which is written and read again.
    pieces = 4 // z.element
    case = z.case
    packing = Pass("the adapters in one tensor", z.a + z.b, z.a + z.b)
    return [
        packing,
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("y = x Wᵀ + S B_eᵀ", z.x + z.w + z.s + z.b, z.y, z.gemm + z.over_n),
        packing,
        Pass(
            "C of every adapter", z.a + z.b, 4 * z.adapters * case.N, 2.0 * z.adapters * case.R**2 * (case.K + case.N)
        ),
        Pass("dS, u and dB from one sweep over G", z.y + z.s + z.b, 2 * z.s + pieces * z.b, 3 * z.over_n),
        Pass("the pieces of dB", pieces * z.b, z.b),
        Pass("dA from one sweep over x", z.x + z.s, pieces * z.a, z.over_k),
        Pass("the pieces of dA", pieces * z.a, z.a),
        Pass("dX = G W + dS A_e", z.y + z.w + z.s + z.a, z.x, z.gemm + z.over_k),
    ]


def _adapter_grads(z: Sizes) -> list[Pass]:
    return [
        Pass("dS = G B_e", z.y + z.b, z.s, z.over_n),
        Pass("dB = Gᵀ S", z.y + z.s, z.b, z.over_n),
        Pass("dA = dSᵀ x", z.x + z.s, z.a, z.over_k),
        Pass("dS A_e", z.s + z.a, z.x, z.over_k),
    ]


def _grouped_mm(z: Sizes) -> list[Pass]:
    y, dx = _frozen(z)
    return [
        y,
        Pass("x by adapter", z.x, z.x),
        Pass("the adapters in one tensor", z.a + z.b, z.a + z.b),
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("S B_eᵀ", z.s + z.b, z.y, z.over_n),
        Pass("rows as they lay", z.y, z.y),
        Pass("+", 2 * z.y, z.y),
        dx,
        Pass("G by adapter", z.y, z.y),
        *_adapter_grads(z),
        Pass("rows as they lay", z.x, z.x),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _peft(z: Sizes) -> list[Pass]:
    y, dx = _frozen(z)
    return [
        y,
        Pass("x of each adapter", z.x, z.x),
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("S B_eᵀ", z.s + z.b, z.y, z.over_n),
        Pass("· scaling", z.y, z.y),
        Pass("y of each adapter", z.y, z.y),
        Pass("+", 2 * z.y, z.y),
        Pass("into y", z.y, z.y),
        dx,
        Pass("G of each adapter, of +=", z.y, z.y),
        Pass("G · scaling", z.y, z.y),
        *_adapter_grads(z),
        Pass("rows as they lay", z.x, z.x),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


_COUNTS: dict[str, Callable[[Sizes], list[Pass]]] = {
    "frozen": _frozen,
    "ours": _ours,
    "grouped-mm": _grouped_mm,
    "peft": _peft,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: all providers but those that are a sum of others."""


def adapter_passes(name: str, case: AdaptersCase) -> list[Pass]:
    """The passes of forward and backward of `name` at `case`."""
    return _COUNTS[name](Sizes(case.layer, adapters=case.adapters))
