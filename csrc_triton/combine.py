"""``out = Σ_p w_p partial_p``: the second stage of every deterministic split reduction, and of clipping."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import join_chain
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, narrow, offsets

_MAX_PARTS_AT_ONCE = 16


@triton.jit
def _combine_tile(
    partial_ptr,
    weight_ptr,
    out_ptr,
    group,
    tile,
    start,
    stop,
    UNITS,
    stride_weight,
    OUT_DTYPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of ``out[group] = Σ_p w[p] · partial[p]`` over the p from `start` up to `stop`; partial [·, UNITS · UNIT].

    BLOCK_P parts are loaded at once and every BLOCK_P-th is added to the same sum, then those sums: in fp32, in an order that
    the number of parts and the compiled kernel decide.
    """
    # Whole units are what makes wide loads of any number of them.
    NUMEL = UNITS.to(tl.int64) * UNIT
    offs = offsets(tile.to(tl.int64) * BLOCK, BLOCK)
    mask = offs < NUMEL
    acc = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for p in range(start, stop, BLOCK_P):
        offs_p = offsets(p, BLOCK_P)
        mask_p = offs_p < stop
        part_ptrs = partial_ptr + offs_p[:, None] * NUMEL + offs[None, :]
        part = tl.load(part_ptrs, mask=mask_p[:, None] & mask[None, :], other=0.0)  # [BLOCK_P, BLOCK]
        if HAS_WEIGHT:
            part *= tl.load(weight_ptr + offs_p * stride_weight, mask=mask_p, other=0.0)[:, None]
        acc += part
    tl.store(out_ptr + group * NUMEL + offs, narrow(tl.sum(acc, axis=0), OUT_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["P", "UNITS", "TILES"])
def _combine_kernel(
    partial_ptr,
    weight_ptr,
    first_ptr,
    out_ptr,
    P,
    UNITS,
    TILES,
    stride_weight,
    CHAIN: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[q] = Σ_p w[p] · partial[p]`` over the p of group q: P of them, or from first[q] to first[q+1].

    partial [·, UNITS · UNIT] and out [Q, UNITS · UNIT] are contiguous. One program writes a tile of one group, one of TILES.
    """
    join_chain(CHAIN)
    group = (tl.program_id(0) // TILES).to(tl.int64)
    start = group * P
    stop = start + P
    if HAS_FIRST:
        start = tl.load(first_ptr + group).to(tl.int64)
        stop = tl.load(first_ptr + group + 1).to(tl.int64)
    tile = tl.program_id(0) % TILES
    _combine_tile(
        partial_ptr,
        weight_ptr,
        out_ptr,
        group,
        tile,
        start,
        stop,
        UNITS,
        stride_weight,
        OUT_DTYPE,
        HAS_WEIGHT,
        UNIT,
        BLOCK_P,
        BLOCK,
    )


@triton.jit(do_not_specialize=["P", "UNITS_1", "UNITS_2", "TILES_1"])
def _combine_pair_kernel(
    partial_1_ptr,
    partial_2_ptr,
    out_1_ptr,
    out_2_ptr,
    P,
    UNITS_1,
    UNITS_2,
    TILES_1,
    CHAIN: tl.constexpr,
    OUT_DTYPE_1: tl.constexpr,
    OUT_DTYPE_2: tl.constexpr,
    UNIT_1: tl.constexpr,
    UNIT_2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out_i = Σ_p partial_i[p]`` for two partial_i [P, UNITS_i · UNIT_i]: TILES_1 programs write out_1, the rest out_2."""
    join_chain(CHAIN)
    pid = tl.program_id(0)
    # One group of parts, with offsets of 64 bits.
    stop = P.to(tl.int64)
    if pid < TILES_1:
        _combine_tile(
            partial_1_ptr,
            None,
            out_1_ptr,
            0,
            pid,
            stop * 0,
            stop,
            UNITS_1,
            0,
            OUT_DTYPE_1,
            False,
            UNIT_1,
            BLOCK_P,
            BLOCK,
        )
    else:
        pid -= TILES_1
        _combine_tile(
            partial_2_ptr,
            None,
            out_2_ptr,
            0,
            pid,
            stop * 0,
            stop,
            UNITS_2,
            0,
            OUT_DTYPE_2,
            False,
            UNIT_2,
            BLOCK_P,
            BLOCK,
        )


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


def combine_pair(first: Tensor, second: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """`combine` of first [P, ...] and of second [P, ...] in one launch; P >= 1, neither empty."""
    partials, parts = (first, second), first.shape[0]
    outs = [torch.empty(t.shape[1:], device=t.device, dtype=dtype) for t, dtype in zip(partials, dtypes)]
    at_once, block = _block(parts)
    numels = [out.numel() for out in outs]
    units = [wide_unit(numel) for numel in numels]
    tiles = [cdiv(numel, block) for numel in numels]
    launch(
        _combine_pair_kernel,
        (sum(tiles),),
        *partials,
        *outs,
        parts,
        numels[0] // units[0],
        numels[1] // units[1],
        tiles[0],
        OUT_DTYPE_1=TRITON_DTYPE[outs[0].dtype],
        OUT_DTYPE_2=TRITON_DTYPE[outs[1].dtype],
        UNIT_1=units[0],
        UNIT_2=units[1],
        BLOCK_P=at_once,
        BLOCK=block,
    )
    return outs[0], outs[1]


def combine_groups(
    partial: Tensor,
    groups: int,
    parts: int,
    first: Tensor | None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The sums [Q, ...] in `dtype` of each group's parts of ``partial [·, ...]``: `parts` of them a group, or those from
    ``first[q]`` to ``first[q + 1]`` (int32 [Q + 1]). `out`, where it is given, is contiguous and has its own dtype."""
    if out is None:
        out = torch.empty(groups, *partial.shape[1:], device=partial.device, dtype=dtype)
    _launch(partial, None, first, out, groups, parts)
    return out


def _launch(partial, weights, first, out, groups, parts) -> None:
    numel = math.prod(partial.shape[1:])
    if numel == 0 or groups == 0:
        return
    # Ragged groups are the pieces of a long sample: a few.
    at_once, block = _block(4 if first is not None else parts)
    tiles, unit = cdiv(numel, block), wide_unit(numel)
    launch(
        _combine_kernel,
        (groups * tiles,),
        partial,
        weights,
        first,
        out,
        parts,
        numel // unit,
        tiles,
        0 if weights is None else weights.stride(0),
        OUT_DTYPE=TRITON_DTYPE[out.dtype],
        HAS_WEIGHT=weights is not None,
        HAS_FIRST=first is not None,
        UNIT=unit,
        BLOCK_P=at_once,
        BLOCK=block,
    )


def _block(parts: int) -> tuple[int, int]:
    """How many parts, and how many elements of each, a program takes at once."""
    at_once = min(1 << (parts - 1).bit_length(), _MAX_PARTS_AT_ONCE)
    return at_once, max(128, 512 // at_once)


def wide_unit(numel: int) -> int:
    """8 where rows of `numel` elements begin at a wide load, else 1."""
    return 8 if numel % 8 == 0 else 1
