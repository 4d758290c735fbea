"""When a provider's results are right: closer to fp64 than a multiple of what plain torch of the same dtypes is."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from allora_kernels.testing import max_error


class Expected(NamedTuple):
    """One result by its name: in fp64, and how far plain torch in the provider's dtypes is from that."""

    name: str
    exact: Tensor
    eager_error: float


def expectation(names: Iterable[str], eager: Iterable[Tensor], exact: Iterable[Tensor]) -> list[Expected]:
    """What to compare with, from the results of plain torch in the provider's dtypes and in fp64."""
    return [Expected(name, e.detach(), max_error(a, e)) for name, a, e in zip(names, eager, exact, strict=True)]


def fault(
    expected: list[Expected], results: Iterable[Tensor], tolerance: float, rounding: torch.dtype | None = None
) -> str | None:
    """What is wrong with `results`, in words; None if each is within `tolerance` times its `eager_error`, and one rounding in
    `rounding` (None: in its own dtype)."""
    for (name, exact, eager_error), actual in zip(expected, results):
        error = max_error(actual, exact)
        limit = tolerance * eager_error + torch.finfo(rounding or actual.dtype).eps * exact.abs().max().item()
        # Written so that a nan is wrong.
        if actual.shape != exact.shape or not error <= limit:
            return f"{name} is off by {error:.2e}, the limit is {limit:.2e}"
    return None
