"""``out = Σ_p w_p partial_p``: the second stage of every deterministic split reduction, and of clipping."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, narrow, offsets


@triton.jit(do_not_specialize=["P", "NUMEL", "TILES"])
def _combine_kernel(
    partial_ptr,
    weight_ptr,
    first_ptr,
    out_ptr,
    P,
    NUMEL,
    TILES,
    stride_weight,
    OUT_DTYPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[q] = Σ_p w[p] · partial[p]`` over the p of group q: P of them, or from first[q] to first[q+1].

    partial [·, NUMEL] and out [Q, NUMEL] are contiguous. One program writes BLOCK elements of one group, one of TILES;
    the sum over p runs in order, in fp32.
    """
    offs = offsets((tl.program_id(0) % TILES).to(tl.int64) * BLOCK, BLOCK)
    group = (tl.program_id(0) // TILES).to(tl.int64)
    mask = offs < NUMEL
    start = group * P
    stop = start + P
    if HAS_FIRST:
        start = tl.load(first_ptr + group).to(tl.int64)
        stop = tl.load(first_ptr + group + 1).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in range(start, stop):
        part = tl.load(partial_ptr + p * NUMEL + offs, mask=mask, other=0.0)
        if HAS_WEIGHT:
            part *= tl.load(weight_ptr + p * stride_weight)
        acc += part
    tl.store(out_ptr + group * NUMEL + offs, narrow(acc, OUT_DTYPE), mask=mask)


def combine(partial: Tensor, dtype: torch.dtype, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``Σ_p w[p] · partial[p]`` in `dtype` for partial [P, ...] (fp32, contiguous) and weights [P] (fp32; None: ones).

    `out`, where it is given, is contiguous and of that dtype. P = 0 gives zeros.
    """
    if out is None:
        out = torch.empty(partial.shape[1:], device=partial.device, dtype=dtype)
    if partial.shape[0] == 0:
        return out.zero_()
    _launch(partial, weights, None, out, 1, partial.shape[0])
    return out


def combine_groups(partial: Tensor, groups: int, parts: int, first: Tensor | None) -> Tensor:
    """The sums [Q, ...] in fp32 of each group's parts of ``partial [·, ...]``: `parts` of them a group, or those from
    ``first[q]`` to ``first[q + 1]`` (int32 [Q + 1])."""
    out = torch.empty(groups, *partial.shape[1:], device=partial.device, dtype=torch.float32)
    _launch(partial, None, first, out, groups, parts)
    return out


def _launch(partial, weights, first, out, groups, parts) -> None:
    numel, block = math.prod(partial.shape[1:]), 512
    if numel == 0 or groups == 0:
        return
    tiles = cdiv(numel, block)
    launch(
        _combine_kernel,
        (groups * tiles,),
        partial,
        weights,
        first,
        out,
        parts,
        numel,
        tiles,
        0 if weights is None else weights.stride(0),
        OUT_DTYPE=TRITON_DTYPE[out.dtype],
        HAS_WEIGHT=weights is not None,
        HAS_FIRST=first is not None,
        BLOCK=block,
    )
