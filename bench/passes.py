"""Every provider as the passes it makes over memory: what each reads, writes and multiplies, as data.

Counted by hand from the code of each provider (PEFT's and torch's autograd included) for one dtype of x and adapter, or
an fp32 adapter where the provider has one. A pass is one kernel that can overlap its own loads and arithmetic.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from allora_kernels.layer.backend import TRITON_INSTALLED

from .cases import Case

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Pass:
    """`reads` and `writes` in bytes of device memory; `flops` of its products; `cached` bytes go to and from the L2 cache
    only (partial sums and atomics that fit it)."""

    name: str
    reads: float
    writes: float
    flops: float = 0.0
    cached: float = 0.0

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The time of the pass where it is bound by one of the two."""
        return max(self.flops / flops_per_s, (self.reads + self.writes) / bytes_per_s)


class Sizes:
    """Bytes of the tensors of a case, of so many weights and adapters of its shapes, and FLOPs of its products."""

    def __init__(self, case: Case, weights: int = 1, adapters: int = 1) -> None:
        m, n, k, r = case.M, case.N, case.K, case.R
        element, adapter = _BYTES[case.dtype], _BYTES[case.adapter_dtype]
        self.case, self.element, self.adapters = case, element, adapters
        self.x, self.y, self.w = m * k * element, m * n * element, weights * n * k * element
        self.a, self.b, self.s = adapters * r * k * adapter, adapters * n * r * adapter, m * r * adapter
        self.gemm = 2.0 * m * n * k
        self.over_k, self.over_n = 2.0 * m * k * r, 2.0 * m * n * r
        """FLOPs of a product of S's shape with A, and with B."""


def _frozen(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    return [Pass("y = x Wᵀ", z.x + z.w, z.y, z.gemm)], [Pass("dX = G W", z.y + z.w, z.x, z.gemm)]


def _floor(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    forward, backward = _frozen(z)
    return (
        [*forward, Pass("FLOPs of S and S Bᵀ", 0, 0, z.over_k + z.over_n)],
        [*backward, Pass("FLOPs of dS, dS A, dB and dA", 0, 0, 2 * z.over_n + 2 * z.over_k)],
    )


def _s(z: Sizes) -> Pass:
    return Pass("S = x Aᵀ", z.x + z.a, z.s, z.over_k)


def _epilogue(z: Sizes) -> tuple[Pass, Pass]:
    return (
        Pass("y = x Wᵀ + S Bᵀ", z.x + z.w + z.s + z.b, z.y, z.gemm + z.over_n),
        Pass("dX = G W + dS A", z.y + z.w + z.s + z.a, z.x, z.gemm + z.over_k),
    )


def _sums(z: Sizes) -> list[Pass]:
    """dS, u, dB and dA on an H100, as `layer_grads` orders them: dB and dA beside the GEMM for dX; or one sweep over G for dS,
    u and dB, as `sweep_plan` cuts it, and one over x."""
    case = z.case
    together = Pass("dS, u and dB from one sweep over G", z.y + z.s + z.b, 2 * z.s + z.b, 3 * z.over_n)
    of_x = Pass("dA from one sweep over x", z.x + z.s, z.a, z.over_k)
    apart = Pass("dS and u from a pass over G", z.y + 2 * z.b, 2 * z.s, 2 * z.over_n)
    if not TRITON_INSTALLED:
        return [together, of_x]
    from csrc_triton.outer_pair import pick_pair
    from csrc_triton.sweep_plan import plan_sweep

    dtype, adapter_dtype = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)
    compute = torch.promote_types(dtype, adapter_dtype)
    if pick_pair(case.N, case.K, case.R, dtype, "sm_90", compute) is not None:
        return [apart, Pass("dB and dA from G and x", z.y + z.x + 2 * z.s, z.a + z.b, z.over_n + z.over_k)]
    plan = plan_sweep(case.M, case.N, case.R, "row", 2, True, dtype, compute, "sm_90")
    if not plan.separate:
        more = plan.extra_reads * z.y
        return [replace(together, reads=together.reads + more, cached=plan.partial_bytes), of_x]
    return [
        replace(apart, reads=z.y * plan.extra_reads + 2 * z.b),
        Pass("dB from a sweep over G", z.y + z.s, z.b, z.over_n, plan.partial_bytes),
        of_x,
    ]


def _ours(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    y, dx = _epilogue(z)
    return [_s(z), y], [_coefficient(z), *_sums(z), dx]


def _coefficient(z: Sizes) -> Pass:
    return Pass("C from A Aᵀ and B", z.a + z.b, 4 * z.case.N, 2.0 * z.case.R**2 * (z.case.K + z.case.N))


def _epilogue_atomics(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    case = z.case
    y, dx = _epilogue(z)
    # fp32 atomics, read and written: a share of dS for each 64 columns, one of dB (dA) for each 512 rows.
    ds = 2 * -(-case.N // 64) * case.M * case.R * 4
    segments = -(-case.M // 512)
    return [_s(z), y], [
        Pass(
            "dS and dB from one sweep over G", z.y + z.s + z.b, 0, 2 * z.over_n, ds + 2 * segments * case.N * case.R * 4
        ),
        Pass("dA from one sweep over x", z.x + z.s, 0, z.over_k, 2 * segments * case.K * case.R * 4),
        dx,
    ]


def _addmm(z: Sizes, again: bool = False) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    ds = Pass("dS = G B", z.y + z.b, z.s, z.over_n)
    return [gemm_y, _s(z), Pass("y += S Bᵀ", z.y + z.s + z.b, z.y, z.over_n)], [
        ds,
        gemm_dx,
        Pass("dX += dS A", z.x + z.s + z.a, z.x, z.over_k),
        *([_s(z), ds] if again else []),
        Pass("dB = Gᵀ S", z.y + z.s, z.b, z.over_n),
        Pass("dA = dSᵀ x", z.x + z.s, z.a, z.over_k),
    ]


def _eager(z: Sizes, compiled: bool = False) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    case, wide = z.case, z.y * 4 // z.element
    product = case.N * case.K * 4
    scaled = (
        [Pass("C ⊙ G", z.y, z.y)] if compiled else [Pass("C ⊙ G in fp32", z.y, wide), Pass("C ⊙ G rounded", wide, z.y)]
    )
    return [gemm_y, _s(z), Pass("S Bᵀ", z.s + z.b, z.y, z.over_n), Pass("y + S Bᵀ", 2 * z.y, z.y)], [
        Pass("BA", z.a + z.b, product, 2.0 * case.N * case.K * case.R),
        Pass("norms of BA's rows", product, 4 * case.N),
        *scaled,
        gemm_dx,
        Pass("dS = G B", z.y + z.b, z.s, z.over_n),
        Pass("dS A", z.s + z.a, z.x, z.over_k),
        Pass("dX + dS A", 2 * z.x, z.x),
        Pass("u = (C ⊙ G) B", z.y + z.b, z.s, z.over_n),
        Pass("dA = uᵀ x", z.x + z.s, z.a, z.over_k),
        Pass("dB = (C ⊙ G)ᵀ S", z.y + z.s, z.b, z.over_n),
    ]


def _eager_gram(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    return [gemm_y, _s(z), Pass("S Bᵀ", z.s + z.b, z.y, z.over_n), Pass("y + S Bᵀ", 2 * z.y, z.y)], [
        _coefficient(z),
        Pass("dS = G B", z.y + z.b, z.s, z.over_n),
        Pass("u = G (C ⊙ B)", z.y + z.b, z.s, z.over_n),
        Pass("dA = uᵀ x", z.x + z.s, z.a, z.over_k),
        Pass("dB = C ⊙ Gᵀ S", z.y + z.s, z.b, z.over_n),
        gemm_dx,
        Pass("dS A", z.s + z.a, z.x, z.over_k),
        Pass("dX + dS A", 2 * z.x, z.x),
    ]


def _peft(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    return [
        gemm_y,
        _s(z),
        Pass("S Bᵀ", z.s + z.b, z.y, z.over_n),
        Pass("· scaling", z.y, z.y),
        Pass("+", 2 * z.y, z.y),
    ], [
        gemm_dx,
        Pass("G · scaling", z.y, z.y),
        Pass("dS", z.y + z.b, z.s, z.over_n),
        Pass("dB", z.y + z.s, z.b, z.over_n),
        Pass("dA", z.x + z.s, z.a, z.over_k),
        Pass("dS A", z.s + z.a, z.x, z.over_k),
        Pass("dX + dS A", 2 * z.x, z.x),
    ]


def _peft_fp32(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    x, y = z.x * 4 // z.element, z.y * 4 // z.element
    return [
        gemm_y,
        Pass("x to fp32", z.x, x),
        Pass("S", x, z.s, z.over_k),
        Pass("S Bᵀ", z.s, y, z.over_n),
        Pass("· scaling", y, y),
        Pass("+", z.y + y, y),
        Pass("y from fp32", y, z.y),
    ], [
        Pass("G to fp32", z.y, y),
        Pass("G of the base layer", y, z.y),
        gemm_dx,
        Pass("G · scaling", y, y),
        Pass("dS", y, z.s, z.over_n),
        Pass("dB", y, z.b, z.over_n),
        Pass("dA", x, z.a, z.over_k),
        Pass("dS A", z.s, x, z.over_k),
        Pass("dS A from fp32", x, z.x),
        Pass("dX + dS A", 2 * z.x, z.x),
    ]


def _peft_autocast(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    """PEFT takes x to its factors' dtype, autocast back; dX likewise."""
    forward, (gemm_dx, *adapter, added) = _peft(z)
    x = z.x * 4 // z.element
    gemm_y, *rest = forward
    return [gemm_y, Pass("x to fp32", z.x, x), Pass("x from fp32", x, z.x), *rest], [
        gemm_dx,
        *adapter,
        Pass("dS A to fp32", z.x, x),
        Pass("dS A from fp32", x, z.x),
        added,
    ]


def _peft_dora(z: Sizes) -> tuple[list[Pass], list[Pass]]:
    (gemm_y,), (gemm_dx,) = _frozen(z)
    eye = z.case.K**2 * z.element

    def elementwise(name: str, reads: int) -> Pass:
        return Pass(name, reads * z.y, z.y)

    return [
        gemm_y,
        Pass("an identity [K, K]", 0, eye),
        Pass("identity Aᵀ", eye, z.a, 2.0 * z.case.K**2 * z.case.R),
        Pass("BA", z.a + z.b, z.w, 2.0 * z.case.N * z.case.K * z.case.R),
        Pass("BA · scaling", z.w, z.w),
        Pass("W + BA", 2 * z.w, z.w),
        Pass("norms of W + BA", z.w, 0),
        _s(z),
        Pass("S Bᵀ", z.s + z.b, z.y, z.over_n),
        elementwise("y - bias", 1),
        elementwise("(m - 1) y", 1),
        elementwise("m S Bᵀ", 1),
        elementwise("· scaling", 1),
        elementwise("sum", 2),
        elementwise("+", 2),
    ], [
        elementwise("G · scaling", 1),
        elementwise("m G", 1),
        elementwise("G ⊙ S Bᵀ", 2),
        Pass("its sum over rows", z.y, 0),
        elementwise("(m - 1) G", 1),
        elementwise("G ⊙ y", 2),
        Pass("its sum over rows", z.y, 0),
        elementwise("G + (m - 1) G", 2),
        gemm_dx,
        Pass("dS", z.y + z.b, z.s, z.over_n),
        Pass("dB", z.y + z.s, z.b, z.over_n),
        Pass("dA", z.x + z.s, z.a, z.over_k),
        Pass("dS A", z.s + z.a, z.x, z.over_k),
        Pass("dX + dS A", 2 * z.x, z.x),
    ]


_COUNTS: dict[str, Callable[[Sizes], tuple[list[Pass], list[Pass]]]] = {
    "frozen": _frozen,
    "the low-rank FLOPs alone": _floor,
    "ours": _ours,
    "epilogue-atomics": _epilogue_atomics,
    "addmm-in-place": _addmm,
    "addmm-in-place, S and dS computed twice": lambda z: _addmm(z, again=True),
    "peft": _peft,
    "peft-fp32": _peft_fp32,
    "peft-autocast": _peft_autocast,
    "peft-dora": _peft_dora,
    "eager": _eager,
    "compile": lambda z: _eager(z, compiled=True),
    "eager-gram": _eager_gram,
    # The compiler leaves the products and the sums after them apart.
    "compile-gram": _eager_gram,
}
COUNTED = tuple(_COUNTS)
"""What can be counted: the providers, and two that exist only on paper."""


def passes(name: str, case: Case, kind: str) -> list[Pass]:
    """The passes of `name` at `case` for `kind`: "forward", "backward" or "forward_backward"."""
    # What the factors are, or are cast to, whatever the case's are.
    factors = {"peft-fp32": "float32", "peft-autocast": case.dtype}.get(name, case.adapter_dtype)
    case = replace(case, adapter_dtype=factors)
    forward, backward = _COUNTS[name](Sizes(case))
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[kind]


def total(passes: Iterable[Pass]) -> tuple[float, float]:
    """(FLOPs, bytes of device memory) of all passes."""
    passes = list(passes)
    return sum(p.flops for p in passes), sum(p.reads + p.writes for p in passes)
