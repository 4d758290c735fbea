"""A weight in 4 bits, as bitsandbytes packs it, made dense: one launch, also where its scales are in 8 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, added_apart, narrow, offsets

_BYTES = 1024
"""Of the packed weight that a program makes dense: 8 a thread, which it stores as 32 bytes or more in a run."""


@triton.jit
def _dequantize_4bit_kernel(
    out_ptr,
    packed_ptr,
    code_ptr,
    scale_ptr,
    scale_code_ptr,
    scale_scale_ptr,
    offset_ptr,
    NUMEL,
    NUM_BYTES,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``out[2 i] = code[packed[i] >> 4] scale`` and ``out[2 i + 1] = code[packed[i] & 15] scale`` for out [NUMEL], packed
    [NUM_BYTES], code [16] and a scale for each HALF_BLOCK bytes; NESTED: ``scale_code[number] own + offset`` with an own for
    each SCALE_BLOCK scales.

    One program writes 2 HALF_BLOCK BLOCKS elements; computes in fp32, rounds once.
    """
    block = offsets(tl.program_id(0) * BLOCKS, BLOCKS)
    exists = 2 * HALF_BLOCK * block < NUMEL
    scale = tl.load(scale_ptr + block, mask=exists, other=0)
    if NESTED:
        own = tl.load(scale_scale_ptr + block // SCALE_BLOCK, mask=exists, other=0.0)
        # Rounded after the product and after the sum, as by a kernel for each.
        scale = added_apart(tl.load(scale_code_ptr + scale.to(tl.int32)) * own, tl.load(offset_ptr))
    offs = block[:, None] * HALF_BLOCK + tl.arange(0, HALF_BLOCK)[None, :]  # [BLOCKS, HALF_BLOCK]
    packed = tl.load(packed_ptr + offs, mask=offs < NUM_BYTES, other=0).to(tl.int32)
    first = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    second = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    offs_out = block[:, None] * (2 * HALF_BLOCK) + tl.arange(0, 2 * HALF_BLOCK)[None, :]
    out = narrow(tl.interleave(first, second), DTYPE)  # [BLOCKS, 2 HALF_BLOCK]
    tl.store(out_ptr + offs_out, out, mask=offs_out < NUMEL)


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scale_code: Tensor | None,
    scale_scales: Tensor | None,
    offset: Tensor | None,
    block: int,
    scale_block: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [n, k] in `dtype`. `packed` (uint8) has two of its numbers a byte, the first in the upper half; each stands
    for an entry of `code` [16], times a scale for each `block` numbers.

    scales [n k / block] in fp32; or in uint8, where each stands for an entry of scale_code [256] times one of scale_scales for
    each `scale_block`, plus offset (one element). Codes, scale_scales and offset are fp32, `block` is a power of two from 32
    to 4096; all contiguous.
    """
    out = torch.empty(n, k, device=packed.device, dtype=dtype)
    blocks = max(1, 2 * _BYTES // block)
    launch(
        _dequantize_4bit_kernel,
        (cdiv(n * k, blocks * block),),
        out,
        packed,
        code,
        scales,
        scale_code,
        scale_scales,
        offset,
        n * k,
        cdiv(n * k, 2),
        DTYPE=TRITON_DTYPE[dtype],
        NESTED=scale_code is not None,
        SCALE_BLOCK=scale_block,
        HALF_BLOCK=block // 2,
        BLOCKS=blocks,
        num_warps=4,
    )
    return out
