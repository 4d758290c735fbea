"""The per-sample steps on Triton, under the names and arguments of the `reference` beside it.

No `torch.library` ops: what is recorded is never traced by torch.compile.
"""

import torch
from torch import Tensor

import csrc_triton

from .reference import squared_norms
from .samples import Samples

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def _segments(samples: Samples) -> csrc_triton.Segments:
    return csrc_triton.Segments(samples.count, samples.longest, samples.pieces, samples.first)


def sample_grads(*args) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *args, samples = args
    return csrc_triton.sample_grads(*args, _segments(samples))


def sample_squared_norms(*args) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    *args, samples = args
    return csrc_triton.sample_squared_norms(*args, _segments(samples))


def weighted_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    weights: Tensor,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    samples: Samples,
) -> tuple[Tensor | None, Tensor | None]:
    rows = samples.spread(weights)
    _, da, db = csrc_triton.adapter_grads(g, x, s, b, c, eta, norm, False, dtype_a, dtype_b, row_weights=rows)
    return da if dtype_a is not None else None, db if dtype_b is not None else None


def weighted_sum(grad_sample: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    return csrc_triton.combine(grad_sample.contiguous(), dtype, weights)
