"""Groups of rows, each with factors (and a weight) of its own: where a tile of rows lies is found on the device.

`ends` [E] (int32) says where each group of rows ends; the next one starts there. Rows after the last end belong to no group:
they get zeros, and give nothing to any sum.

Where rows are not sorted by group, `order` [M] (int32) sorts them: the row at place m of the groups is row ``order[m]`` of x, G
and y, which stay as they are. What is as small as S lies in the groups' order, so that it is read and written in a run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def _bounds(ends_ptr, M, GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """(first row, end) of every group; group GROUPS is the rows that belong to none, and those after it have no rows."""
    offs_e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + offs_e, mask=offs_e < GROUPS, other=0)
    starts = tl.load(ends_ptr + offs_e - 1, mask=(offs_e > 0) & (offs_e <= GROUPS), other=0)
    return tl.where(offs_e <= GROUPS, starts, M), tl.where(offs_e < GROUPS, ends, M)


@triton.jit
def group_tile(tile, ends_ptr, M, ROWS, GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """(group, first row, end of the group) of tile number `tile`, where every group is cut into tiles of ROWS rows.

    The rows that belong to no group are group GROUPS, the last; a tile past all of them has no rows. BLOCK_E > GROUPS.
    """
    starts, ends = _bounds(ends_ptr, M, GROUPS, BLOCK_E)
    tiles = (ends - starts + ROWS - 1) // ROWS
    after = tl.cumsum(tiles, axis=0)
    group = tl.minimum(tl.sum((after <= tile).to(tl.int32), axis=0), GROUPS)
    mine = tl.arange(0, BLOCK_E) == group
    stop = tl.sum(tl.where(mine, ends, 0), axis=0)
    start = tl.sum(tl.where(mine, starts + (tile - after + tiles) * ROWS, 0), axis=0)
    return group, tl.minimum(start, stop), stop


@triton.jit
def rows_at(order_ptr, offs_m, mask_m, HAS_ORDER: tl.constexpr):
    """The rows of x, G or y at the places `offs_m` of the groups."""
    rows = offs_m
    if HAS_ORDER:
        rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    return rows


@triton.jit(do_not_specialize=["M"])
def _first_pieces_kernel(ends_ptr, first_ptr, M, ROWS, GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """``first[e]``: how many tiles of ROWS rows lie before group e, for e from 0 to GROUPS; one program."""
    starts, ends = _bounds(ends_ptr, M, GROUPS, BLOCK_E)
    tiles = (ends - starts + ROWS - 1) // ROWS
    offs_e = tl.arange(0, BLOCK_E)
    tl.store(first_ptr + offs_e, tl.cumsum(tiles, axis=0) - tiles, mask=offs_e <= GROUPS)


def first_pieces(ends: Tensor, M: int, rows: int) -> Tensor:
    """The first piece of every group, [E + 1] (int32), where groups are cut into pieces of `rows` rows."""
    E = ends.shape[0]
    first = torch.empty(E + 1, device=ends.device, dtype=torch.int32)
    launch(_first_pieces_kernel, (1,), ends, first, M, rows, GROUPS=E, BLOCK_E=block_of(E), num_warps=1)
    return first


def most_tiles(M: int, groups: int, rows: int) -> int:
    """The most tiles of `rows` rows that M rows can have, in `groups` groups and what belongs to none."""
    return min(M, M // rows + groups + 1)


def block_of(groups: int) -> int:
    """BLOCK_E for this many groups."""
    return 1 << groups.bit_length()


def group_strides(t: Tensor | None, dims: int = 2) -> tuple[int, ...]:
    """The strides of a tensor of `dims` dimensions, or of one for every group: 0 for the groups where there are none, and all 0
    for None."""
    if t is None:
        return (0,) * (dims + 1)
    return t.stride() if t.dim() > dims else (0, *t.stride())
