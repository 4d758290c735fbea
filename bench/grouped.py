"""What the sections "experts" and "adapters" share: how a provider is judged, and the passes that both count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .judging import Expected, expectation, fault
from .passes import Pass, Sizes
from .steps import Step


@dataclass(frozen=True)
class Spec:
    """How a provider is built and judged: `formula` is what it computes, "frozen", "allora" (rule "row") or "lora". Its error
    may be `tolerance` times that of the loop in the batch's own dtype. `needs` is "peft", "grouped_mm" or None. `apart`: its
    step gives results group by group, which the judge joins, untimed."""

    description: str
    build: Callable[[Any], Step]
    formula: str = "lora"
    tolerance: float = 8.0
    needs: str | None = None
    apart: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run here; None where it can."""
        if self.needs == "peft":
            try:
                from peft.tuners.lora.layer import ParamWrapper  # noqa: F401
            except ImportError:
                return "no peft with target_parameters is installed"
        if self.needs == "grouped_mm" and not hasattr(F, "grouped_mm"):
            return "this torch has no torch.nn.functional.grouped_mm"
        return None


class Judge:
    """Compares providers with `loop`, which gives a formula's results in the batch's own dtype and in fp64, called once for
    each formula; `names` are those of the results, of which the frozen formula has the first two. `join` puts together the
    results of a provider that gives them apart."""

    def __init__(
        self,
        names: Sequence[str],
        loop: Callable[[str], tuple[Sequence[Tensor], Sequence[Tensor]]],
        join: Callable[[Any], Sequence[Tensor]] | None = None,
    ) -> None:
        self._names, self._loop, self._join = names, loop, join
        self._expected: dict[str, list[Expected]] = {}

    def verdict(self, spec: Spec, step: Step) -> str | None:
        """What is wrong with the provider's results, in words; None if nothing is."""
        if spec.formula not in self._expected:
            eager, exact = self._loop(spec.formula)
            self._expected[spec.formula] = expectation(self._names[: len(exact)], eager, exact)
        results = self._join(step()) if spec.apart else step()
        return fault(self._expected[spec.formula], results, spec.tolerance)


def frozen(z: Sizes) -> list[Pass]:
    """y and dX without adapters."""
    return [Pass("y = x W_eᵀ", z.x + z.w, z.y, z.gemm), Pass("dX = G W_e", z.y + z.w, z.x, z.gemm)]


def ours_forward(z: Sizes) -> list[Pass]:
    """The forward pass of the kernels of groups."""
    return [
        Pass("S = x A_eᵀ", z.x + z.a, z.s, z.over_k),
        Pass("y = x W_eᵀ + S B_eᵀ", z.x + z.w + z.s + z.b, z.y, z.gemm + z.over_n),
    ]


def ours_backward(z: Sizes) -> list[Pass]:
    """Their backward pass. Each group's sum over its rows is in one piece in fp32 at least, which is written and read again."""
    pieces, case = 4 // z.element, z.case
    return [
        Pass("C of each", z.a + z.b, 4 * z.adapters * case.N, 2.0 * z.adapters * case.R**2 * (case.K + case.N)),
        Pass("dS, u and dB from one sweep over G", z.y + z.s + z.b, 2 * z.s + pieces * z.b, 3 * z.over_n),
        Pass("the pieces of dB", pieces * z.b, z.b),
        Pass("dA from one sweep over x", z.x + z.s, pieces * z.a, z.over_k),
        Pass("the pieces of dA", pieces * z.a, z.a),
        Pass("dX = G W_e + dS A_e", z.y + z.w + z.s + z.a, z.x, z.gemm + z.over_k),
    ]


def adapter_backward(z: Sizes) -> list[Pass]:
    """The adapters' part of a backward pass, a product a pass."""
    return [
        Pass("dS = G B_e", z.y + z.b, z.s, z.over_n),
        Pass("dB = Gᵀ S", z.y + z.s, z.b, z.over_n),
        Pass("dA = dSᵀ x", z.x + z.s, z.a, z.over_k),
        Pass("dS A_e", z.s + z.a, z.x, z.over_k),
    ]
