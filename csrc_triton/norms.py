"""Squared norms of tensors that lie one after the other."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .combine import wide_unit
from .configs import cdiv
from .launching import launch
from .tiling import offsets

_BLOCK = 1024


@triton.jit(do_not_specialize=["UNITS", "PER_PROGRAM", "PARTS"])
def _squared_norms_kernel(t_ptr, out_ptr, UNITS, PER_PROGRAM, PARTS, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """``out[q, p] = Σ t[q, i]²`` over part p of the i, for contiguous t [Q, UNITS · UNIT], out [Q, PARTS], both fp32.

    One program sums PER_PROGRAM blocks of one row, in order.
    """
    NUMEL = UNITS.to(tl.int64) * UNIT
    group = (tl.program_id(0) // PARTS).to(tl.int64)
    start = (tl.program_id(0) % PARTS).to(tl.int64) * PER_PROGRAM * BLOCK
    acc = tl.zeros((BLOCK,), tl.float32)
    for block in range(PER_PROGRAM):
        offs = offsets(start + block * BLOCK, BLOCK)
        t = tl.load(t_ptr + group * NUMEL + offs, mask=offs < NUMEL, other=0.0)
        acc += t * t
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc, axis=0))


def squared_norms(t: Tensor) -> Tensor:
    """``Σ t[q]²  [Q]`` in fp32 for t [Q, ...] (fp32, contiguous)."""
    count, numel = t.shape[0], math.prod(t.shape[1:])
    blocks = cdiv(numel, _BLOCK)
    parts = configs.num_splits(count, blocks, 1, configs.arch_of(t.device), waves=4)
    per_program = max(1, cdiv(blocks, parts))
    parts = max(1, cdiv(blocks, per_program))
    out = torch.empty(count, parts, device=t.device, dtype=torch.float32)
    if count:
        unit = wide_unit(numel)
        launch(
            _squared_norms_kernel,
            (count * parts,),
            t,
            out,
            numel // unit,
            per_program,
            parts,
            UNIT=unit,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out.sum(dim=1)
