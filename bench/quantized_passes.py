"""The providers of the section "quantized" as the passes they make over memory.

Counted by hand from the code of each, bitsandbytes', PEFT's and torch's autograd included, as `passes` does for one layer.
"""

from collections.abc import Callable
from dataclasses import replace

from .passes import Pass, Sizes, passes
from .quantized import QuantizedCase


def _dequantized(case: QuantizedCase) -> Pass:
    """4 bits a weight and 8 for the scale of each 64 of them are read."""
    weights = case.N * case.K
    return Pass("W from 4 bits", weights * (1 / 2 + 1 / 64), 2 * weights)


def _with_weights(case: QuantizedCase, forward: list[Pass], backward: list[Pass]) -> list[Pass]:
    """Each pass makes the weight dense first."""
    return [_dequantized(case), *forward, _dequantized(case), *backward]


def _as_dense(provider: str) -> Callable[[QuantizedCase], list[Pass]]:
    """As `provider` of the section "layer", with a weight to dequantize in each pass."""
    return lambda case: _with_weights(case, *(passes(provider, case.layer, kind) for kind in ("forward", "backward")))


def _added(case: QuantizedCase) -> list[Pass]:
    z = Sizes(case.layer)
    s, _ = passes("ours", case.layer, "forward")
    *adapter, _ = passes("ours", case.layer, "backward")
    (y,), (dx,) = (passes("frozen", case.layer, kind) for kind in ("forward", "backward"))
    return _with_weights(
        case,
        [y, s, Pass("y += S Bᵀ", z.y + z.s + z.b, z.y, z.over_n)],
        [*adapter, dx, Pass("dX += dS A", z.x + z.s + z.a, z.x, z.over_k)],
    )


def _peft(case: QuantizedCase) -> list[Pass]:
    z = Sizes(case.layer)
    copied = Pass("y copied", z.y, z.y)
    if case.adapter_dtype == case.dtype:
        y, *forward = passes("peft", case.layer, "forward")
        return _with_weights(case, [y, copied, *forward], passes("peft", case.layer, "backward"))
    # The low-rank product comes back to y's dtype before it is added.
    y, *forward, added, _ = passes("peft-fp32", case.layer, "forward")
    wide = 2 * z.y
    forward += [Pass("S Bᵀ from fp32", wide, z.y), replace(added, reads=2 * z.y, writes=z.y)]
    _, _, *backward = passes("peft-fp32", case.layer, "backward")
    backward = [Pass("G to fp32", z.y, wide), *backward]
    return _with_weights(case, [y, copied, *forward], backward)


_COUNTS: dict[str, Callable[[QuantizedCase], list[Pass]]] = {
    "frozen": _as_dense("frozen"),
    "ours": _as_dense("ours"),
    "ours-added": _added,
    "peft": _peft,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: all providers."""


def quantized_passes(name: str, case: QuantizedCase) -> list[Pass]:
    """The passes of forward and backward of `name` at `case`."""
    return _COUNTS[name](case)
