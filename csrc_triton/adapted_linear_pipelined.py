"""`adapted_linear` for Hopper in Gluon: y and S by one GEMM, S by the tiles of its first column, which have x in shared memory.

A tile of the first column multiplies each step of x by A, too, and is done with S [BLOCK_M, R] when it is done with x. The
other tiles of these rows need it for their last step, and wait for it. All tiles of the first column come before any other,
and a program that is done takes the next tile that nobody has taken. So what is waited for is in the hands of a program that
runs, and waits for nothing: whatever else holds multiprocessors, no wait is for ever. The backward pass takes the same kernel
for dX, dS and u (`layer_grads_pipelined`). Not yet measured: no plan takes it unasked (`plans.options`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .chain import chained, join_chain
from .configs import Config, cdiv
from .fused_linear_pipelined import (
    describe,
    describe_as_stored,
    launch_options,
    let_next_kernel_begin,
    make_ring,
    multiply_step,
    slot_of,
    wait_for_kernel_in_front,
    wait_for_round,
    write_tile,
)
from .gluon_names import (
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    sync_threads,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .launching import launch
from .tiling import grouped_tile, in_steps


@triton.jit
def count_tiles(tiles_ptr, num_m, BLOCK_L: tl.constexpr):
    """Begin to count the tiles of a GEMM: ``tiles[i] = 1`` for i < num_m, as those rows of S are yet to be written, and
    ``tiles[num_m] = 0``, as none has been taken. One program writes BLOCK_L elements."""
    offs = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    tl.store(tiles_ptr + offs, (offs < num_m).to(tl.int32), mask=offs <= num_m)


@triton.jit
def _count_tiles_kernel(tiles_ptr, num_m, CHAIN: tl.constexpr, BLOCK_L: tl.constexpr):
    """`count_tiles`."""
    join_chain(CHAIN)
    count_tiles(tiles_ptr, num_m, BLOCK_L)


@gluon.jit
def _tile_start(tile, num_m, num_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    # What comes after the last tile starts where that does.
    tile = min(tile, num_m * num_n - 1)
    pid_m, pid_n = grouped_tile(max(tile - num_m, 0), num_m, max(num_n - 1, 1), GROUP_M)
    in_first_column = tile < num_m
    pid_m = tile if in_first_column else pid_m
    pid_n = 0 if in_first_column else pid_n + 1
    return pid_m * BLOCK_M, pid_n * BLOCK_N


@gluon.jit
def _load_wide(count, ring, a_bufs, descs, a_desc, start_m, start_n, k, makes_s, takes_s, W_ROWS_OVER_K: gl.constexpr):
    """Begin to load a step over K: of x and W, and of A for a tile that makes S."""
    left, right, full = slot_of(count, ring, descs)
    NBYTES: gl.constexpr = descs[0].block_type.nbytes + descs[1].block_type.nbytes
    mbarrier.expect(full, NBYTES, pred=takes_s)
    mbarrier.expect(full, NBYTES + a_desc.block_type.nbytes, pred=makes_s)
    needed = makes_s | takes_s
    load_tile(descs[0], [start_m, k], full, left, pred=needed)
    load_tile(descs[1], [k, start_n] if W_ROWS_OVER_K else [start_n, k], full, right, pred=needed)
    load_tile(a_desc, [0, k], full, a_bufs.index(count % a_bufs.shape[0]), pred=makes_s)


@gluon.jit
def _load_low_rank(count, ring, descs, start_m, start_n, makes_s, takes_s, B_ROWS_OVER_R: gl.constexpr):
    """Begin to load the step over the rank: of B, and of S for a tile that does not make it."""
    left, right, full = slot_of(count, ring, descs)
    mbarrier.expect(full, descs[0].block_type.nbytes + descs[1].block_type.nbytes, pred=takes_s)
    mbarrier.expect(full, descs[1].block_type.nbytes, pred=makes_s)
    load_tile(descs[0], [start_m, 0], full, left, pred=takes_s)
    load_tile(descs[1], [0, start_n] if B_ROWS_OVER_R else [start_n, 0], full, right, pred=makes_s | takes_s)


@gluon.jit
def _take_tile(tiles_ptr, counted_ptr, num_m, CHAIN: gl.constexpr):
    """The next tile that nobody has taken, counted if it is of the first column."""
    tile = gl.atomic_add(tiles_ptr + num_m, 1, sem="relaxed")
    before = 0
    if counted_ptr is not None:  # noqa: SIM102 (a condition of its own decides what is compiled)
        if tile < num_m:
            before = gl.atomic_add(counted_ptr, 1)
    if CHAIN != "":  # noqa: SIM102 (a condition of its own decides what is compiled)
        # Once every program has taken one of these, the whole first column is taken. As to `before`: see `chain.join_chain`.
        if (tile >= num_m - gl.num_programs(0)) & (before >= 0):
            let_next_kernel_begin()
    return tile


@gluon.jit
def _load_step(
    at,
    given,
    W_ROWS_OVER_K: gl.constexpr,
    B_ROWS_OVER_R: gl.constexpr,
    CHAIN: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Begin to load the step `at`: its number, its tile, its number in that, where the tile starts. Returns the next one."""
    count, tile, step, start_m, start_n = at
    ring, a_bufs, wide, low_rank, a_desc, sizes, tiles_ptr, counted_ptr = given
    num_m, num_n, k_steps = sizes
    BLOCK_M: gl.constexpr = wide[0].block_type.shape[0]
    BLOCK_K: gl.constexpr = wide[0].block_type.shape[1]
    needed = tile < num_m * num_n
    makes_s = needed & (start_n == 0)
    takes_s = needed & (start_n != 0)
    if step < k_steps:
        _load_wide(count, ring, a_bufs, wide, a_desc, start_m, start_n, step * BLOCK_K, makes_s, takes_s, W_ROWS_OVER_K)
    else:
        if takes_s:
            wait_for_round(tiles_ptr, start_m // BLOCK_M)
        _load_low_rank(count, ring, low_rank, start_m, start_n, makes_s, takes_s, B_ROWS_OVER_R)
    step += 1
    if step == k_steps + 1:
        step = 0
        tile = _take_tile(tiles_ptr, counted_ptr, num_m, CHAIN)
        start_m, start_n = _tile_start(tile, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
    return count + 1, tile, step, start_m, start_n


@gluon.jit
def _write_s(s, s_ptr, tiles_ptr, counted_ptr, start_m, M, S_WIDTH):
    """Write the tile `s` to S, and say that it is there."""
    offs_m = start_m + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, s.type.layout))
    offs_r = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    s_ptrs = s_ptr + offs_m.to(gl.int64)[:, None] * S_WIDTH + offs_r[None, :]
    gl.store(s_ptrs, s, mask=(offs_m < M)[:, None] & (offs_r < S_WIDTH)[None, :])
    sync_threads()
    gl.atomic_add(tiles_ptr + start_m // s.shape[0], -1, sem="release")
    if counted_ptr is not None:
        gl.atomic_add(counted_ptr, -1, sem="release")


@gluon.jit
def _adapted_linear_pipelined_kernel(
    x_desc,
    w_desc,
    a_desc,
    s_desc,
    b_desc,
    y_desc,
    bias_ptr,
    s_ptr,
    tiles_ptr,
    counted_ptr,
    stride_bias,
    S_WIDTH,
    CHAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    W_ROWS_OVER_K: gl.constexpr,
    B_ROWS_OVER_R: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``S = x Aᵀ [M, S_WIDTH]`` and ``y = x Wᵀ + bias + S[:, :R] Bᵀ`` for x [M, K], W [N, K] (W_ROWS_OVER_K: stored [K, N]),
    A [S_WIDTH, K], B [N, R] (B_ROWS_OVER_R: stored [R, N]), y [M, N], all 16-bit, R <= S_WIDTH <= BLOCK_R.

    A program writes tiles of y and, of the first column, the rows of S, as long as there are tiles that nobody has taken;
    accumulates in fp32, rounds once. ``tiles [tiles of M + 1]`` as `count_tiles` writes it; with counts (`chain`) each tile of
    S is counted, too, from when it is taken until it is written.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    ring, wide, low_rank = make_ring(x_desc, w_desc, STAGES), (x_desc, w_desc), (s_desc, b_desc)
    # It begins to count the tiles.
    if CHAIN == "link":
        wait_for_kernel_in_front()

    num_m, num_n = gl.cdiv(y_desc.shape[0], BLOCK_M), gl.cdiv(y_desc.shape[1], BLOCK_N)
    k_steps = gl.cdiv(x_desc.shape[1], BLOCK_K)
    tile = _take_tile(tiles_ptr, counted_ptr, num_m, CHAIN)
    start_m, start_n = _tile_start(tile, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
    at = (0, tile, 0, start_m, start_n)
    given = (ring, a_bufs, wide, low_rank, a_desc, (num_m, num_n, k_steps), tiles_ptr, counted_ptr)
    for _ in gl.static_range(STAGES - 1):
        at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M)
    count = 0
    # Descriptors reach rows of whole 16 bytes alone.
    S_WIDTH = in_steps(S_WIDTH, 8)
    offs_r = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, s_layout))
    while tile < num_m * num_n:
        start_m, start_n = _tile_start(tile, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=acc_layout)
        if start_n == 0:
            acc_s = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, layout=s_layout)
            for step in range(0, k_steps):
                left, right, filled = slot_of(count, ring, wide)
                mbarrier.wait(filled, count // STAGES & 1)
                if not W_ROWS_OVER_K:
                    right = right.permute((1, 0))
                a = a_bufs.index(count % STAGES).permute((1, 0))
                acc = warpgroup_mma(left, right, acc, use_acc=step > 0, is_async=True)
                acc_s = warpgroup_mma(left, a, acc_s, use_acc=step > 0, is_async=True)
                # Those of the step before.
                acc, acc_s = warpgroup_mma_wait(2, deps=(acc, acc_s))
                sync_threads()
                at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M)
                count += 1
            acc, acc_s = warpgroup_mma_wait(0, deps=(acc, acc_s))
            s = acc_s.to(s_desc.dtype)
            left, right, filled = slot_of(count, ring, low_rank)
            # Of what is no column of S times B an infinite x would make NaN.
            left.store(gl.where((offs_r < s_desc.shape[1])[None, :], s, 0.0))
            fence_async_shared()
            _write_s(s, s_ptr, tiles_ptr, counted_ptr, start_m, s_desc.shape[0], S_WIDTH)
        else:
            for step in range(0, k_steps):
                acc = multiply_step(acc, step > 0, count, ring, wide, W_ROWS_OVER_K)
                at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M)
                count += 1
        acc = multiply_step(acc, True, count, ring, low_rank, B_ROWS_OVER_R)
        at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M)
        count += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        write_tile(acc, y_desc, y_bufs, bias_ptr, stride_bias, start_m, start_n, HAS_BIAS)
        # Loads run ahead, by less than a tile.
        tile = at[1]
    tma.store_wait(pendings=0)


def tiles_of(m: int, config: Config, device: torch.device) -> Tensor:
    """Room for the counts of a GEMM's tiles, of m rows in all."""
    return torch.empty(cdiv(m, config.BLOCK_M) + 1, device=device, dtype=torch.int32)


def adapted_linear_pipelined(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """``(y [M, N], S [M, R])`` in x's dtype for x [M, K], weight [N, K], a [R, K] and b [N, R] of one 16-bit dtype, all of
    which descriptors reach; M >= 1, R <= BLOCK_R, K over at least `num_stages` - 1 steps."""
    M, N, R = len(x), len(weight), len(a)
    y, s = (torch.empty(M, n, device=x.device, dtype=x.dtype) for n in (N, R))
    tiles = tiles_of(M, config, x.device)
    with chained(configs.can_overlap(x.device), "link"):
        launch(_count_tiles_kernel, (cdiv(len(tiles), 32),), tiles, len(tiles) - 1, BLOCK_L=32, num_warps=1)
        launch_by_first_column(x, weight, bias, a, s, b, y, config, tiles)
    return y, s


def launch_by_first_column(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    config: Config,
    tiles: Tensor,
    counted: Tensor | None = None,
) -> None:
    """``S = x Aᵀ`` into s [M, width] and ``y = x Wᵀ + bias + S[:, :R] Bᵀ`` into y [M, N], for a [width, K] and b [N, R]; else
    as in `adapted_linear_pipelined`.

    tiles (`tiles_of`) is what the kernel in front begins to count; counted: as `chain.counts`, for what runs beside this and
    waits for S.
    """
    N, R = b.shape
    block_m, block_n, block_k, block_r = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    w_desc, w_rows_over_k = describe_as_stored(weight, block_n, block_k)
    b_desc, b_rows_over_r = describe_as_stored(b, block_n, block_r)
    launch(
        _adapted_linear_pipelined_kernel,
        (min(configs.num_sms(x.device), cdiv(len(x), block_m) * cdiv(N, block_n)),),
        describe(x, block_m, block_k),
        w_desc,
        describe(a, block_r, block_k),
        describe(s[:, :R], block_m, block_r),
        b_desc,
        describe(y, block_m, block_n // 4),
        bias,
        s,
        tiles,
        counted,
        0 if bias is None else bias.stride(0),
        s.shape[1],
        HAS_BIAS=bias is not None,
        W_ROWS_OVER_K=w_rows_over_k,
        B_ROWS_OVER_R=b_rows_over_r,
        **launch_options(config, beside=counted is not None),
    )
