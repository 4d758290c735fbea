"""A `torch.library` op for each launcher of groups, as `layer.ops` has them for the single layer."""

from collections.abc import Callable

from torch import Tensor

import csrc_triton

from ..layer.ops import define, weight_coefficient

__all__ = ["grouped_adapter_grads", "grouped_down_project", "grouped_fused_linear", "weight_coefficient"]

grouped_down_project: Callable[..., Tensor] = define(
    "grouped_down_project(Tensor x, Tensor a, Tensor ends, ScalarType dtype, Tensor? order=None) -> Tensor",
    csrc_triton.grouped_down_project,
    lambda x, a, ends, dtype, order=None: x.new_empty(x.shape[0], a.shape[1], dtype=dtype),
)

grouped_fused_linear: Callable[..., Tensor] = define(
    "grouped_fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor b, Tensor ends, Tensor? order=None)"
    " -> Tensor",
    csrc_triton.grouped_fused_linear,
    lambda x, weight, bias, s, b, ends, order=None: x.new_empty(x.shape[0], weight.shape[-2]),
)


def _grouped_adapter_grads_fake(
    g, x, s, b, c, ends, eta, norm, need_ds, dtype_a, dtype_b, order=None, inv_etas_squared=None
):
    groups, n, r = b.shape
    ds = s.new_empty((g.shape[0], r) if need_ds else (0,))
    da = s.new_empty(0) if dtype_a is None else s.new_empty(groups, r, x.shape[1], dtype=dtype_a)
    db = s.new_empty(0) if dtype_b is None else s.new_empty(groups, n, r, dtype=dtype_b)
    return ds, da, db


grouped_adapter_grads: Callable[..., tuple[Tensor, Tensor, Tensor]] = define(
    "grouped_adapter_grads(Tensor g, Tensor? x, Tensor s, Tensor b, Tensor? c, Tensor ends, float eta, str? norm, bool need_ds,"
    " ScalarType? dtype_a, ScalarType? dtype_b, Tensor? order=None, Tensor? inv_etas_squared=None) -> (Tensor, Tensor, Tensor)",
    csrc_triton.grouped_adapter_grads,
    _grouped_adapter_grads_fake,
)
