"""`layer_grads` for Hopper: dX, dS and u by one GEMM in Gluon, dS and u by the tiles of its first column.

For these ``[B, C ⊙ B]`` is what A is to `adapted_linear_pipelined`, so a small kernel in front writes it, transposed. The sums
for dB and dA run beside the GEMM, as in `layer_grads`, those for dA when all of u is there. Not yet measured.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .adapted_linear_pipelined import count_tiles, launch_by_first_column, tiles_of
from .chain import Counted, chained, join_chain
from .configs import Config, cdiv
from .launching import launch
from .outer_pair import add_up_pair, outer_pair
from .sweep import Rule
from .tiling import narrow, offsets


@triton.jit
def _stack_factors_kernel(
    b_ptr,
    c_ptr,
    stacked_ptr,
    tiles_ptr,
    num_m,
    N,
    R,
    stride_bn,
    stride_br,
    stride_c,
    CHAIN: tl.constexpr,
    HAS_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``stacked = Bᵀ [BLOCK_R, N]``, with HAS_C ``[Bᵀ; (C ⊙ B)ᵀ] [2 BLOCK_R, N]``, for B [N, R] and C [N]; zeros from R on.

    One program writes BLOCK_N columns, and begins to count as many tiles (`count_tiles`).
    """
    join_chain(CHAIN)
    count_tiles(tiles_ptr, num_m, BLOCK_N)
    offs_n = offsets(tl.program_id(0) * BLOCK_N, BLOCK_N)
    offs_r = offsets(0, BLOCK_R)
    mask_n = offs_n < N
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=(offs_r < R)[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
    out_ptrs = stacked_ptr + offs_r[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, b, mask=mask_n[None, :])
    if HAS_C:
        c = tl.load(c_ptr + offs_n * stride_c, mask=mask_n, other=0.0)
        out_ptrs += tl.full((), BLOCK_R, tl.int64) * N
        tl.store(out_ptrs, narrow(b * c[None, :], b_ptr.dtype.element_ty), mask=mask_n[None, :])


def stack_factors(b: Tensor, c: Tensor | None, tiles: Tensor) -> Tensor:
    """``Bᵀ``, or with c [N] ``[Bᵀ; (C ⊙ B)ᵀ]``, for b [N, R] and in its dtype, each of `configs.block_r` rows; begins to count
    `tiles`."""
    N, R = b.shape
    block_r, block_n = configs.block_r(R), 64
    stacked = torch.empty(block_r if c is None else 2 * block_r, N, device=b.device, dtype=b.dtype)
    launch(
        _stack_factors_kernel,
        (cdiv(max(N, len(tiles)), block_n),),
        b,
        c,
        stacked,
        tiles,
        len(tiles) - 1,
        N,
        R,
        *b.stride(),
        0 if c is None else c.stride(0),
        HAS_C=c is not None,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4,
    )
    return stacked


def layer_grads_pipelined(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    rules: tuple[Rule, Rule],
    config: Config,
    pair: Config,
    dtypes: tuple[torch.dtype, torch.dtype],
    under_way_here: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA and dB as from `layer_grads`, for operands of one 16-bit dtype all of which descriptors reach, and M >= 1; c [N]
    under the rule "row", else None; `rules`: of dB and dA; `under_way_here`: `chain.counts`."""
    (M, K), R = x.shape, s.shape[1]
    half = configs.block_r(R)
    config = dataclasses.replace(config, BLOCK_R=half if c is None else 2 * half)
    dx = torch.empty(M, K, device=g.device, dtype=g.dtype)
    ds_and_u = torch.empty(M, config.BLOCK_R, device=g.device, dtype=g.dtype)
    tiles = tiles_of(M, config, g.device)
    with chained(configs.can_overlap(g.device), "link", "late"):
        stacked = stack_factors(b, c, tiles)
        launch_by_first_column(g, weight.mT, None, stacked, ds_and_u, a.mT, dx, config, tiles, under_way_here)
        u = ds_and_u[:, :R] if c is None else ds_and_u[:, half : half + R]
        sums = outer_pair(g, s, rules[0], x, u, rules[1], pair, dtypes, Counted(under_way_here, 1, M))
        del stacked
    return dx, *add_up_pair(*sums, dtypes)
