"""The per-sample steps on Triton, with the arguments and results of the `reference` beside it, which says their shapes.

No `torch.library` ops: what is recorded is never traced by torch.compile.
"""

import csrc_triton

from .reference import squared_norms
from .samples import Samples

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def _segments(samples: Samples) -> csrc_triton.Segments:
    return csrc_triton.Segments(samples.count, samples.longest, samples.pieces, samples.first)


def sample_grads(g, x, s, b, c, eta, norm, need_ds, need_da, need_db, samples):
    return csrc_triton.sample_grads(g, x, s, b, c, eta, norm, need_ds, need_da, need_db, _segments(samples))


def sample_squared_norms(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b, samples):
    return csrc_triton.sample_squared_norms(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b, _segments(samples))


def weighted_grads(g, x, s, b, c, eta, norm, weights, dtype_a, dtype_b, samples):
    rows = samples.spread(weights)
    _, da, db = csrc_triton.adapter_grads(g, x, s, b, c, eta, norm, False, dtype_a, dtype_b, row_weights=rows)
    return da if dtype_a is not None else None, db if dtype_b is not None else None


def weighted_sum(grad_sample, weights, dtype):
    return csrc_triton.combine(grad_sample.contiguous(), dtype, weights)
