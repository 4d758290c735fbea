"""``out = scale ⊙ Σ_p partial_p``: the second stage of every deterministic split reduction."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .tiling import TRITON_DTYPE, narrow, offsets


@triton.jit(do_not_specialize=["P", "NUMEL"])
def _combine_kernel(
    partial_ptr,
    scale_ptr,
    out_ptr,
    P,
    NUMEL,
    COLUMNS,
    stride_scale,
    OUT_DTYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[i,j] = scale[i] · Σ_p partial[p,i,j]`` for contiguous partial [P, I, J], out [I, J] and scale [I].

    One program writes BLOCK elements of out; the sum over p runs in order, in fp32.
    """
    offs = offsets(tl.program_id(0).to(tl.int64) * BLOCK, BLOCK)
    mask = offs < NUMEL
    acc = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + offs
    for _ in range(P):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += NUMEL
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + (offs // COLUMNS) * stride_scale, mask=mask, other=0.0)
    tl.store(out_ptr + offs, narrow(acc, OUT_DTYPE), mask=mask)


def combine(partial: Tensor, dtype: torch.dtype, scale: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Sum ``partial [P, I, J]`` (fp32, contiguous, P >= 1) over p into ``[I, J]`` of `dtype`, rows times ``scale [I]``.

    `out`, where it is given, is contiguous and of that dtype.
    """
    num_partials, rows, columns = partial.shape
    if out is None:
        out = torch.empty(rows, columns, device=partial.device, dtype=dtype)
    numel = out.numel()
    if numel == 0:
        return out
    block = 512
    launch(
        _combine_kernel,
        (triton.cdiv(numel, block),),
        partial,
        scale,
        out,
        num_partials,
        numel,
        columns,
        0 if scale is None else scale.stride(0),
        OUT_DTYPE=TRITON_DTYPE[dtype],
        HAS_SCALE=scale is not None,
        BLOCK=block,
    )
    return out
