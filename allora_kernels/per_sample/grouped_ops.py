"""The per-sample steps of groups on Triton, with the arguments and results of the `grouped_reference` beside it."""

import csrc_triton

from .ops import squared_norms, weighted_sum

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def sample_grads(g, x, s, b, c, eta, norm, need_ds, need_da, need_db, samples):
    where, needs = (samples.pieces, samples.count), (need_ds, need_da, need_db)
    return csrc_triton.grouped_sample_grads(g, x, s, b, c, *where, eta, norm, *needs)


def sample_squared_norms(g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b, samples):
    where, needs = (samples.pieces, samples.count), (need_ds, dtype_a, dtype_b)
    return csrc_triton.grouped_sample_squared_norms(g, x, s, b, c, *where, eta, norm, *needs)


def weighted_grads(g, x, s, b, c, eta, norm, weights, dtype_a, dtype_b, samples):
    rows, ends = samples.spread(weights), samples.ends(b.shape[0])
    dtypes = (dtype_a, dtype_b)
    _, da, db = csrc_triton.grouped_adapter_grads(g, x, s, b, c, ends, eta, norm, False, *dtypes, row_weights=rows)
    return da if dtype_a is not None else None, db if dtype_b is not None else None
