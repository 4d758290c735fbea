"""When a provider's results are right: closer to fp64 than a multiple of what plain torch of the same dtypes is."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from allora_kernels.testing import error_limit, max_error


class Expected(NamedTuple):
    """One result by its name: in fp64, and how far plain torch in the provider's dtypes is from that."""

    name: str
    exact: Tensor
    eager_error: float


def expectation(names: Iterable[str], eager: Iterable[Tensor], exact: Iterable[Tensor]) -> list[Expected]:
    """What to compare with, from the results of plain torch in the provider's dtypes and in fp64."""
    return [Expected(name, e.detach(), max_error(a, e)) for name, a, e in zip(names, eager, exact, strict=True)]


def fault(expected: list[Expected], results: Iterable[Tensor], tolerance: float) -> str | None:
    """What is wrong with `results`, in words; None if each is within its `error_limit` in its own dtype: a gradient of fp32
    factors that was computed in 16 bits is wrong."""
    for (name, exact, eager_error), actual in zip(expected, results):
        error = max_error(actual, exact)
        limit = error_limit(exact, eager_error, actual.dtype, tolerance)
        # Written so that a nan is wrong.
        if actual.shape != exact.shape or not error <= limit:
            return f"{name} is off by {error:.2e}, the limit is {limit:.2e}"
    return None
