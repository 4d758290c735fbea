"""What `torch.func.vmap` makes of the ops: one launch for all samples where only activations are batched, as they are under
``vmap(grad(...))`` over samples; else one call a sample.

Each takes what `torch.library.register_vmap` hands it for the op of its name.
"""

import torch
from torch import Tensor

import csrc_triton

from ..reference import WEIGHT_NORMS


def _rows(t: Tensor, dim: int) -> Tensor:
    """``[V, M, L]`` batched along `dim` as the rows ``[V·M, L]``."""
    return t.movedim(dim, 0).reshape(-1, t.movedim(dim, 0).shape[-1])


def _one_by_one(op, info, in_dims, args):
    results = [
        op(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims))) for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])


def down_project(info, in_dims, x, a, dtype):
    op = torch.ops.allora.down_project
    if in_dims[1] is not None:
        return _one_by_one(op, info, in_dims, (x, a, dtype))
    return op(_rows(x, in_dims[0]), a, dtype).unflatten(0, (info.batch_size, -1)), 0


def adapted_linear(info, in_dims, x, weight, bias, a, b, dtype):
    op = torch.ops.allora.adapted_linear
    if in_dims[0] is None or in_dims[1:5] != (None, None, None, None):
        return _one_by_one(op, info, in_dims, (x, weight, bias, a, b, dtype))
    y, s = op(_rows(x, in_dims[0]), weight, bias, a, b, dtype)
    return (y.unflatten(0, (info.batch_size, -1)), s.unflatten(0, (info.batch_size, -1))), (0, 0)


def fused_linear(info, in_dims, x, weight, bias, s, b):
    op = torch.ops.allora.fused_linear
    if in_dims[0] is None or in_dims[3] is None or (in_dims[1], in_dims[2], in_dims[4]) != (None, None, None):
        return _one_by_one(op, info, in_dims, (x, weight, bias, s, b))
    y = op(_rows(x, in_dims[0]), weight, bias, _rows(s, in_dims[3]), b)
    return y.unflatten(0, (info.batch_size, -1)), 0


def adapter_grads(info, in_dims, g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b):
    args = (g, x, s, b, c, eta, norm, need_ds, dtype_a, dtype_b)
    batched = {dim is not None for dim, t in zip(in_dims[:3], (g, x, s)) if t is not None}
    if batched != {True} or in_dims[3] is not None or in_dims[4] is not None:
        return _one_by_one(torch.ops.allora.adapter_grads, info, in_dims, args)
    count = info.batch_size
    g, x, s = (None if t is None else _rows(t, dim) for t, dim in zip((g, x, s), in_dims))
    segments = csrc_triton.Segments(count, g.shape[0] // count)
    needs = (need_ds, dtype_a is not None, dtype_b is not None)
    ds, da, db = csrc_triton.sample_grads(g, x, s, b, c, eta, norm, *needs, segments)
    ds = s.new_empty(count, 0) if ds is None else ds.unflatten(0, (count, -1))
    da = s.new_empty(count, 0) if da is None else da.to(dtype_a)
    db = s.new_empty(count, 0) if db is None else db.to(dtype_b)
    return (ds, da, db), (0, 0, 0)


def layer_grads(info, in_dims, g, x, s, weight, a, b, eta, norm, dtype_a, dtype_b, c=None):
    args = (g, x, s, weight, a, b, eta, norm, dtype_a, dtype_b, c)
    if None in in_dims[:3] or in_dims[3:6] != (None, None, None):
        return _one_by_one(torch.ops.allora.layer_grads, info, (*in_dims, None)[:11], args)
    if c is None and norm in WEIGHT_NORMS:
        c = csrc_triton.weight_coefficient(a, b, eta, norm)
    sums = (*in_dims[:3], *(None,) * 7)
    (ds, da, db), _ = adapter_grads(info, sums, g, x, s, b, c, eta, norm, True, dtype_a, dtype_b)
    dx, _ = fused_linear(info, (in_dims[0], None, None, 0, None), g, weight.mT, None, ds, a.mT)
    return (dx, da, db), (0, 0, 0)
