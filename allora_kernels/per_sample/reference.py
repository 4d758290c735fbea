"""Per-sample gradients in plain torch: what the kernels of the same names are tested against, and the eager backend.

Shapes as in `reference`. A sample is a run of rows; `samples` says which. Its gradients are `reference.adapter_grads` of its
rows, with one difference: they stay in fp32, or in what is wider.
"""

import itertools

import torch
from torch import Tensor

from ..reference import scaled_operands, scaled_sum
from .samples import Samples

CHUNK = 2**24
"""Entries of the samples' gradients that are made at a time where only their norms are kept."""


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _outer(v: Tensor, u: Tensor, scale: Tensor | None, samples: Samples) -> Tensor:
    """``scale ⊙ v_iᵀ u_i`` of each sample's rows of v [M, I] and u [M, J]: [b, I, J] in fp32 or better."""
    if samples.starts is None:
        shape = (samples.count, samples.longest)
        outer = torch.bmm(v.view(*shape, v.shape[1]).mT, u.view(*shape, u.shape[1]))
    else:
        outer = v.new_empty(samples.count, v.shape[1], u.shape[1])
        for i, (start, stop) in enumerate(itertools.pairwise(samples.starts)):
            torch.mm(v[start:stop].mT, u[start:stop], out=outer[i])
    outer = _wide(outer)
    # In place: one more tensor of this size costs more than its arithmetic.
    return outer if scale is None else outer.mul_(scale[:, None])


def _outer_squares(v: Tensor, u: Tensor, scale: Tensor | None, samples: Samples) -> Tensor:
    """The squared norm of each matrix of `_outer`, of a bounded number of them at a time: [b].

    Not by Gram matrices, ``Σ (v vᵀ) ⊙ (u uᵀ)``: where the rows of a sample cancel, rounding takes that below zero.
    """
    if samples.starts is not None:
        return _outer(v, u, scale, samples).square().sum((1, 2))
    at_once = max(1, CHUNK // max(1, v.shape[1] * u.shape[1]))
    squares = []
    for start in range(0, max(samples.count, 1), at_once):
        part = Samples.equal(min(at_once, samples.count - start), samples.longest)
        rows = slice(start * samples.longest, start * samples.longest + part.rows)
        squares.append(_outer(_wide(v[rows]), _wide(u[rows]), scale, part).square().sum((1, 2)))
    return torch.cat(squares)


def sample_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    need_da: bool,
    need_db: bool,
    samples: Samples,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dS [M, R]`` in S's dtype, and of each sample ``dA [b, R, K]`` and ``dB [b, N, R]`` in fp32 or better; None where not
    needed. Arguments as for `reference.adapter_grads`."""
    g = g.to(s.dtype)
    ds = g @ lora_B.to(s.dtype) if need_ds else None
    g, s, u, scale_a, scale_b = scaled_operands(g, s, lora_B, c, eta, norm, need_da)
    da = _outer(u, x.to(u.dtype), scale_a, samples) if need_da else None
    return ds, da, _outer(g, s, scale_b, samples) if need_db else None


def sample_squared_norms(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    samples: Samples,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dS; dA and dB as `reference.adapter_grads` gives them; and the squared norm of each sample's gradient of the two
    together ``[b]``, in fp32 or better. None for what is not needed."""
    g = g.to(s.dtype)
    ds = g @ lora_B.to(s.dtype) if need_ds else None
    g, s, u, scale_a, scale_b = scaled_operands(g, s, lora_B, c, eta, norm, dtype_a is not None)
    squares = torch.zeros(samples.count, device=g.device, dtype=torch.promote_types(s.dtype, torch.float32))
    sums = []
    for v, w, scale, dtype in ((u, x, scale_a, dtype_a), (g, s, scale_b, dtype_b)):
        total = None
        if dtype is not None:
            w = w.to(s.dtype)
            squares += _outer_squares(v, w, scale, samples)
            total = scaled_sum(v, w, scale, dtype)
        sums.append(total)
    return ds, *sums, squares


def weighted_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    weights: Tensor,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    samples: Samples,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB as `reference.adapter_grads` gives them, the rows of each sample's G~ times its ``weights [b]``; None where
    not needed."""
    row_weights = samples.spread(weights)
    g, s, u, scale_a, scale_b = scaled_operands(g, s, lora_B, c, eta, norm, dtype_a is not None)
    results = []
    for v, w, scale, dtype in ((u, x, scale_a, dtype_a), (g, s, scale_b, dtype_b)):
        total = None
        if dtype is not None:
            total = scaled_sum((_wide(v) * row_weights[:, None]).to(s.dtype), w.to(s.dtype), scale, dtype)
        results.append(total)
    return tuple(results)


def weighted_sum(grad_sample: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Σ_i weights[i] · grad_sample[i]`` in `dtype` for grad_sample [b, ...]; weights None: ones."""
    if weights is None:
        return grad_sample.sum(0).to(dtype)
    return torch.tensordot(weights.to(grad_sample.dtype), grad_sample, dims=1).to(dtype)


def squared_norms(grad_sample: Tensor) -> Tensor:
    """``‖grad_sample[i]‖² [b]`` in fp32 or better for grad_sample [b, ...]."""
    dtype = torch.promote_types(grad_sample.dtype, torch.float32)
    return torch.linalg.vector_norm(grad_sample.flatten(1), dim=1, dtype=dtype).square()
