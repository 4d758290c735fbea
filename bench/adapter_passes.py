"""The providers of the section "adapters" as the passes they make over memory.

Counted by hand from the code of each, PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable

import torch

from allora_kernels.layer.backend import TRITON_INSTALLED

from .adapters import AdaptersCase
from .cases import Case
from .grouped import adapter_backward, frozen, ours_backward, ours_forward
from .passes import Pass, Sizes


def _ours(z: Sizes) -> list[Pass]:
    """Each product as an H100 has it: by the groups' own tiles, or the vendor's, added to the low-rank products."""
    packing = Pass("the adapters in one tensor", z.a + z.b, z.a + z.b)
    (s, y), (*sums, dx) = ours_forward(z), ours_backward(z)
    case = z.case
    if _by_vendor(case, case.N, case.K):
        y = [Pass("S B_eᵀ", z.s + z.b, z.y, z.over_n), Pass("y += x Wᵀ", z.x + z.w + z.y, z.y, z.gemm)]
    else:
        y = [y]
    if _by_vendor(case, case.K, case.N):
        dx = [Pass("dS A_e", z.s + z.a, z.x, z.over_k), Pass("dX += G W", z.y + z.w + z.x, z.x, z.gemm)]
    else:
        dx = [dx]
    return [packing, s, *y, packing, *sums, *dx]


def _by_vendor(case: Case, n: int, k: int) -> bool:
    if not TRITON_INSTALLED:
        return False
    from csrc_triton import plans

    dtype, adapter_dtype = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)
    call = plans.Call("fused_linear", case.M, n, k, case.R, dtype, torch.promote_types(dtype, adapter_dtype))
    return plans.vendor_beats_groups(call, "sm_90")


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
        *_gathered_back("G by adapter", z.y, z.y),
        *adapter_backward(z),
        *_gathered_back("rows as they lay", z.x, z.x),
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _gathered_back(name: str, whole: float, rows: float) -> list[Pass]:
    """What autograd does for rows that were gathered: zeros of all, and the rows' gradients added to them, in a copy."""
    return [Pass(f"{name}: zeros", 0, whole), Pass(name, whole + rows, whole)]


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
        # Autograd goes through all of G and of dX for each adapter, however few its rows are.
        *z.adapters * _peft_backward_of_one(z, z.y / z.adapters, z.x / z.adapters),
        *adapter_backward(z),
        dx,
        Pass("dX + dS A_e", 2 * z.x, z.x),
    ]


def _peft_backward_of_one(z: Sizes, own_y: float, own_x: float) -> list[Pass]:
    """Of one adapter, whose rows of y and x are `own_y` and `own_x`: through `y[rows] += ...`, a write into a view of y."""
    return [
        Pass("G of the view: zeros", 0, z.y),
        *3 * [Pass("G copied", z.y, z.y)],
        Pass("G without its rows", z.y, z.y + own_y),
        Pass("G of its rows", own_y, own_y),
        Pass("G copied", z.y, z.y),
        *_gathered_back("G of its rows, of +=", z.y, own_y),
        Pass("G + G of its rows", 2 * z.y, z.y),
        Pass("G · scaling", own_y, own_y),
        *_gathered_back("rows as they lay", z.x, own_x),
        Pass("dS A_e + those before", 2 * z.x, z.x),
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
