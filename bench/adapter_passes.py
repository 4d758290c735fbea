"""The providers of the section "adapters" as the passes they make over memory.

Counted by hand from the code of each, PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable

from .adapters import AdaptersCase
from .grouped import adapter_backward, frozen, ours_backward, ours_forward
from .passes import Pass, Sizes


def _ours(z: Sizes) -> list[Pass]:
    packing = Pass("the adapters in one tensor", z.a + z.b, z.a + z.b)
    return [packing, *ours_forward(z), packing, *ours_backward(z)]


def _grouped_mm(z: Sizes) -> list[Pass]:
    y, dx = frozen(z)
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
        *adapter_backward(z),
        Pass("rows as they lay", z.x, z.x),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _peft(z: Sizes) -> list[Pass]:
    y, dx = frozen(z)
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
        *adapter_backward(z),
        Pass("rows as they lay", z.x, z.x),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


_COUNTS: dict[str, Callable[[Sizes], list[Pass]]] = {
    "frozen": frozen,
    "ours": _ours,
    "grouped-mm": _grouped_mm,
    "peft": _peft,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: all providers but those that are a sum of others."""


def adapter_passes(name: str, case: AdaptersCase) -> list[Pass]:
    """The passes of forward and backward of `name` at `case`."""
    return _COUNTS[name](Sizes(case.layer, adapters=case.adapters))
