"""`fused_linear` for Hopper in Gluon: the persistent GEMM, which loads its next tile's operands while it stores this tile of y.

Triton's own pipeline of loads ends with the loop over K, so that every tile begins with an empty one. Here the steps of all
of a program's tiles are one sequence, in which the low-rank product is one more step over K (of a large rank, some), and
their operands go round one ring of buffers. Gluon is experimental: no module may need this one to be imported.
"""

import functools

import torch
from torch import Tensor

from . import configs
from .chain import Counted
from .configs import Config, cdiv
from .fused_linear_persistent import aligned_rows
from .gluon_names import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    reinterpret,
    store_tile,
    sync_threads,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .launching import launch
from .tiling import grouped_tile, in_steps


@gluon.jit
def wait_for_kernel_in_front():
    """`gdc_wait`, in Gluon: until the kernel in front has ended and its writes are seen."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_begin():
    """`gdc_launch_dependents`, in Gluon: the next kernel may begin once every program has come here or ended."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_round(under_way_ptr, rounds_left):
    """Wait until no counted program has more rounds before it than these: then the tensor memory unit sees what they wrote."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred more;
            again:
            ld.acquire.gpu.global.s32 $0, [$1];
            setp.ne.s32 more, $0, 0;
            @more bra again;
            fence.proxy.async.global;
        }
        """,
        "=r,l",
        [(under_way_ptr + rounds_left).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _tile_start(tile, num_m, num_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    # What comes after the last tile starts where that does.
    pid_m, pid_n = grouped_tile(min(tile, num_m * num_n - 1), num_m, num_n, GROUP_M)
    return pid_m * BLOCK_M, pid_n * BLOCK_N


@gluon.jit
def make_ring(left_desc, right_desc, STAGES: gl.constexpr):
    """Buffers for STAGES steps of the left and of the right operand, and for each a barrier that says when they are full."""
    lefts = gl.allocate_shared_memory(left_desc.dtype, [STAGES] + left_desc.block_type.shape, left_desc.layout)
    rights = gl.allocate_shared_memory(right_desc.dtype, [STAGES] + right_desc.block_type.shape, right_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    # Now the tensor memory unit sees them.
    fence_async_shared()
    return lefts, rights, full


@gluon.jit
def slot_of(count, ring, descs):
    """The buffers of step number `count` in the shapes and layouts of `descs` (a narrower one fills the first part of its
    buffer), and the barrier that says when they are full."""
    left_desc, right_desc = descs
    slot = count % ring[0].shape[0]
    PARTS: gl.constexpr = ring[0].shape[2] // left_desc.block_type.shape[1]
    left_shape: gl.constexpr = [PARTS] + left_desc.block_type.shape
    right_shape: gl.constexpr = [PARTS] + right_desc.block_type.shape
    left = reinterpret(ring[0].index(slot), left_desc.dtype, left_shape, left_desc.layout)
    right = reinterpret(ring[1].index(slot), right_desc.dtype, right_shape, right_desc.layout)
    return left.index(0), right.index(0), ring[2].index(slot)


@gluon.jit
def _load(count, ring, descs, start_m, start_n, k, needed, ROWS_OVER_K: gl.constexpr):
    """Begin to load step number `count`: from k on, [BLOCK_M, a step] of the left and [BLOCK_N, a step] (ROWS_OVER_K: the other
    way round) of the right operand."""
    left_desc, right_desc = descs
    left, right, full = slot_of(count, ring, descs)
    mbarrier.expect(full, left_desc.block_type.nbytes + right_desc.block_type.nbytes, pred=needed)
    load_tile(left_desc, [start_m, k], full, left, pred=needed)
    load_tile(right_desc, [k, start_n] if ROWS_OVER_K else [start_n, k], full, right, pred=needed)


@gluon.jit
def _load_step(
    at,
    given,
    W_ROWS_OVER_K: gl.constexpr,
    B_ROWS_OVER_R: gl.constexpr,
    CHAIN: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    NUM_PROGRAMS: gl.constexpr,
):
    """Begin to load the step `at`: its number, its tile, its number in that, where the tile starts, and for how many rounds
    of the counted programs S has been waited for. Returns the next one."""
    count, tile, step, start_m, start_n, waited = at
    ring, wide, low_rank, sizes, counted = given
    under_way_ptr, rounds, rows = counted
    num_m, num_n, k_steps, steps = sizes
    BLOCK_M: gl.constexpr = wide[0].block_type.shape[0]
    BLOCK_K: gl.constexpr = wide[0].block_type.shape[1]
    BLOCK_R: gl.constexpr = low_rank[0].block_type.shape[1]
    needed = tile < num_m * num_n
    if step < k_steps:
        _load(count, ring, wide, start_m, start_n, step * BLOCK_K, needed, W_ROWS_OVER_K)
    else:
        if under_way_ptr is not None:
            needs = min((start_m + BLOCK_M - 1) // rows + 1, rounds)
            if needs > waited:
                wait_for_round(under_way_ptr, rounds - needs)
                waited = needs
        elif CHAIN == "midway":
            wait_for_kernel_in_front()
        _load(count, ring, low_rank, start_m, start_n, (step - k_steps) * BLOCK_R, needed, B_ROWS_OVER_R)
    step += 1
    if step == steps:
        step = 0
        tile += NUM_PROGRAMS
        start_m, start_n = _tile_start(tile, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
    return count + 1, tile, step, start_m, start_n, waited


@gluon.jit
def multiply_step(acc, use_acc, count, ring, descs, ROWS_OVER_K: gl.constexpr):
    """Begin ``acc + left right`` for step number `count`. The step before it has been multiplied when this returns."""
    left, right, full = slot_of(count, ring, descs)
    mbarrier.wait(full, count // ring[0].shape[0] & 1)
    if not ROWS_OVER_K:
        right = right.permute((1, 0))
    acc = warpgroup_mma(left, right, acc, use_acc=use_acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    # Each group of warps has waited for its own product.
    sync_threads()
    return acc


@gluon.jit
def _halves(t):
    """The left and the right half of the tile `t`: each thread keeps what it has."""
    return gl.split(gl.permute(gl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def write_tile(acc, y_desc, y_bufs, bias_ptr, stride_bias, start_m, start_n, HAS_BIAS: gl.constexpr):
    """Begin to store the tile `acc` of y, in quarters of its columns, with the bias."""
    QUARTER_N: gl.constexpr = acc.shape[1] // 4
    # Descriptors reach rows of whole 16 bytes alone.
    N = in_steps(y_desc.shape[1], 8)
    left, right = _halves(acc)
    quarters = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        quarter = quarters[i]
        start = start_n + i * QUARTER_N
        if HAS_BIAS:
            offs_n = start + gl.arange(0, QUARTER_N, layout=gl.SliceLayout(0, quarter.type.layout))
            bias = gl.load(bias_ptr + offs_n.to(gl.int64) * stride_bias, mask=offs_n < N, other=0.0)
            quarter += bias.to(gl.float32)[None, :]
        y_buf = y_bufs.index(i % 2)
        # All but the last store have read their buffers, and so has the one that read this.
        tma.store_wait(pendings=1)
        y_buf.store(quarter.to(y_desc.dtype))
        fence_async_shared()
        store_tile(y_desc, [start_m, start], y_buf)


@gluon.jit
def _fused_linear_pipelined_kernel(
    x_desc,
    w_desc,
    s_desc,
    b_desc,
    y_desc,
    bias_ptr,
    under_way_ptr,
    stride_bias,
    ROUNDS,
    ROUND_M,
    CHAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    W_ROWS_OVER_K: gl.constexpr,
    B_ROWS_OVER_R: gl.constexpr,
    NUM_PROGRAMS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """``y = x Wᵀ + bias + S Bᵀ`` for x [M, K], W [N, K] (W_ROWS_OVER_K: stored [K, N]), S [M, R], B [N, R] (B_ROWS_OVER_R:
    stored [R, N]), y [M, N], all 16-bit.

    Program p writes the tiles p, p + NUM_PROGRAMS, ... of y; accumulates in fp32, rounds once. CHAIN as in
    `_fused_linear_persistent_kernel`. With counts S is what counted programs write (`chain`), ROUND_M rows a round in ROUNDS
    rounds.
    """
    if CHAIN != "":
        let_next_kernel_begin()
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2] + y_desc.block_type.shape, y_desc.layout)
    ring, wide, low_rank = make_ring(x_desc, w_desc, STAGES), (x_desc, w_desc), (s_desc, b_desc)

    num_m, num_n = gl.cdiv(y_desc.shape[0], BLOCK_M), gl.cdiv(y_desc.shape[1], BLOCK_N)
    k_steps = gl.cdiv(x_desc.shape[1], BLOCK_K)
    steps = k_steps + gl.cdiv(s_desc.shape[1], BLOCK_R)
    sizes = (num_m, num_n, k_steps, steps)
    # The steps of all tiles are counted in one row; while number `count` is multiplied, the next STAGES - 1 are loaded.
    first = gl.program_id(0)
    start_m, start_n = _tile_start(first, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
    at = (0, first, 0, start_m, start_n, 0)
    given = (ring, wide, low_rank, sizes, (under_way_ptr, ROUNDS, ROUND_M))
    for _ in gl.static_range(STAGES - 1):
        at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M, NUM_PROGRAMS)
    count = 0
    for tile in range(first, num_m * num_n, NUM_PROGRAMS):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=acc_layout)
        for step in range(0, k_steps):
            acc = multiply_step(acc, step > 0, count, ring, wide, W_ROWS_OVER_K)
            at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M, NUM_PROGRAMS)
            count += 1
        for _step in range(k_steps, steps):
            acc = multiply_step(acc, True, count, ring, low_rank, B_ROWS_OVER_R)
            at = _load_step(at, given, W_ROWS_OVER_K, B_ROWS_OVER_R, CHAIN, BLOCK_N, GROUP_M, NUM_PROGRAMS)
            count += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))

        start_m, start_n = _tile_start(tile, num_m, num_n, BLOCK_M, BLOCK_N, GROUP_M)
        write_tile(acc, y_desc, y_bufs, bias_ptr, stride_bias, start_m, start_n, HAS_BIAS)
    tma.store_wait(pendings=0)
    if under_way_ptr is not None:
        # So that with its end all in front of it has ended.
        wait_for_kernel_in_front()


def launch_pipelined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    config: Config,
    beside: bool = False,
    counted: Counted | None = None,
) -> None:
    """`launch_persistent`, for operands of which EVERYTHING is `describable`. For rows of s that `counted` programs write it
    waits where it needs them."""
    M, N = y.shape
    block_m, block_n, block_k, block_r = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
    programs = configs.num_sms(x.device)
    w_desc, w_rows_over_k = describe_as_stored(weight, block_n, block_k)
    b_desc, b_rows_over_r = describe_as_stored(b, block_n, block_r)
    launch(
        _fused_linear_pipelined_kernel,
        (min(programs, cdiv(M, block_m) * cdiv(N, block_n)),),
        describe(x, block_m, block_k),
        w_desc,
        describe(s, block_m, block_r),
        b_desc,
        describe(y, block_m, block_n // 4),
        bias,
        None if counted is None else counted.under_way,
        0 if bias is None else bias.stride(0),
        *((1, 1) if counted is None else counted[1:]),
        HAS_BIAS=bias is not None,
        W_ROWS_OVER_K=w_rows_over_k,
        B_ROWS_OVER_R=b_rows_over_r,
        NUM_PROGRAMS=programs,
        **launch_options(config, beside),
    )


def launch_options(config: Config, beside: bool) -> dict[str, int]:
    """The last constexprs of a GEMM here and its launch options; `beside`: it leaves registers to what runs beside it."""
    return {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_R": config.BLOCK_R,
        "STAGES": config.num_stages,
        "GROUP_M": config.GROUP_M,
        "num_warps": config.num_warps,
        **(configs.leave_registers(config) if beside else {}),
    }


_GLUON_DTYPE = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def describe(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of `t` in tiles of [rows, columns], laid out as matrix products read them."""
    return TensorDescriptor.from_tensor(t, [rows, columns], _layout(rows, columns, t.dtype))


def describe_as_stored(t: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of `t` in tiles of [rows, columns], or where `t` is stored in columns, of its transpose; and which."""
    turned = not aligned_rows(t)
    return describe(t.mT, columns, rows) if turned else describe(t, rows, columns), turned


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON_DTYPE[dtype])
