"""The per-sample steps of groups on Triton, under the names and arguments of the `grouped_reference` beside it."""

from torch import Tensor

import csrc_triton

from .ops import squared_norms, weighted_sum

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def sample_grads(*args) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *tensors, eta, norm, need_ds, need_da, need_db, samples = args
    needs = (need_ds, need_da, need_db)
    return csrc_triton.grouped_sample_grads(*tensors, samples.pieces, samples.count, eta, norm, *needs)


def sample_squared_norms(*args) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    *tensors, eta, norm, need_ds, dtype_a, dtype_b, samples = args
    needs = (need_ds, dtype_a, dtype_b)
    return csrc_triton.grouped_sample_squared_norms(*tensors, samples.pieces, samples.count, eta, norm, *needs)


def weighted_grads(*args) -> tuple[Tensor | None, Tensor | None]:
    *tensors, eta, norm, weights, dtype_a, dtype_b, samples = args
    rows, ends = samples.spread(weights), samples.ends(tensors[3].shape[0])
    _, da, db = csrc_triton.grouped_adapter_grads(*tensors, ends, eta, norm, False, dtype_a, dtype_b, row_weights=rows)
    return da if dtype_a is not None else None, db if dtype_b is not None else None
