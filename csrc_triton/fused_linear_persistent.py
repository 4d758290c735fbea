"""`fused_linear` for large, aligned operands: as many programs as multiprocessors, tiles by the tensor memory unit."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, plans
from .chain import join_chain
from .configs import Config, cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, add_low_rank, dot, dot_precision, grouped_tile, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M"])
def _fused_linear_persistent_kernel(
    x_desc,
    w_desc,
    y_desc,
    bias_ptr,
    s_ptr,
    b_ptr,
    M,
    N,
    K,
    R,
    stride_bias,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    CHAIN: tl.constexpr,
    DTYPE: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    W_ROWS_OVER_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """``y = x Wᵀ + bias + S Bᵀ`` for x [M, K], W [N, K] (W_ROWS_OVER_K: stored [K, N]), S [M, R], B [N, R], y [M, N].

    Program p writes the tiles p, p + NUM_PROGRAMS, ... of y; accumulates in fp32, rounds once. In a chain it lets the
    next kernel begin, and "midway" waits where it reads S.
    """
    join_chain(CHAIN)
    R, stride_sm, stride_bn = in_steps(R, S_STEP), in_steps(stride_sm, S_STEP), in_steps(stride_bn, B_STEP)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    HALF_N: tl.constexpr = BLOCK_N // 2
    # Flattened with the loop over K, which would have the next tile's loads overlap this one's epilogue, it took a quarter
    # longer on an H200.
    for tile in range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            # A descriptor reads zeros beyond its tensor, and does not write there.
            x = x_desc.load([start_m, k])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([k, start_n]) if W_ROWS_OVER_K else w_desc.load([start_n, k]).T  # [BLOCK_K, BLOCK_N]
            acc = dot(x, w, acc, DTYPE, "ieee")

        if CHAIN == "midway":
            gdc_wait()
        offs_m = offsets(start_m, BLOCK_M)
        offs_n = offsets(start_n, BLOCK_N)
        mask_n = offs_n < N
        acc = add_low_rank(
            acc,
            (s_ptr, stride_sm, stride_sr),
            (b_ptr, stride_bn, stride_br),
            offs_m,
            offs_n,
            offs_m < M,
            mask_n,
            R,
            LOW_RANK_DTYPE,
            LOW_RANK_PRECISION,
            BLOCK_R,
        )
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        # In halves: what waits in shared memory to be stored takes the room of a pipeline stage less.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF_N)), (0, 2, 1)))
        y_desc.store([start_m, start_n], narrow(left, DTYPE))
        y_desc.store([start_m, start_n + HALF_N], narrow(right, DTYPE))


def describable(x: Tensor, weight: Tensor, b: Tensor | None = None, s: Tensor | None = None) -> int:
    """What descriptors reach: `plans.WIDE`, x [M, K], weight [N, K] and y [M, N], where these are 16-bit with rows 16-byte
    aligned and unbroken; `plans.EVERYTHING`, where b [N, R] is given and it (and s [M, R], if given) is like that and in x's
    dtype; else `plans.NOTHING`."""
    wide = x.itemsize == 2 and weight.shape[0] % 8 == 0
    if not (wide and aligned_rows(x) and aligned_either_way(weight)):
        return plans.NOTHING
    if b is None or b.dtype != x.dtype or not aligned_either_way(b):
        return plans.WIDE
    return plans.EVERYTHING if s is None or (s.dtype == x.dtype and aligned_rows(s)) else plans.WIDE


def aligned_rows(t: Tensor) -> bool:
    """Whether each row of `t` is unbroken and begins where a descriptor needs it to."""
    return t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def aligned_either_way(t: Tensor) -> bool:
    """Whether `t` has `aligned_rows`, or its transpose."""
    return aligned_rows(t) or aligned_rows(t.mT)


def launch_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    config: Config,
    beside: bool = False,
) -> None:
    """Fill y, for operands that are `describable`.

    `beside` leaves room for small kernels: in a chain, in which this is the "first" or "midway". In front of the chain y was
    allocated and all was written but s, unless this is its first.
    """
    (M, K), N, R = x.shape, weight.shape[0], s.shape[1]
    w_rows_over_k = not aligned_rows(weight)
    w_block = [config.BLOCK_K, config.BLOCK_N] if w_rows_over_k else [config.BLOCK_N, config.BLOCK_K]
    programs = configs.num_sms(x.device)
    launch(
        _fused_linear_persistent_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)),),
        TensorDescriptor.from_tensor(x, [config.BLOCK_M, config.BLOCK_K]),
        TensorDescriptor.from_tensor(weight.mT if w_rows_over_k else weight, w_block),
        TensorDescriptor.from_tensor(y, [config.BLOCK_M, config.BLOCK_N // 2]),
        bias,
        s,
        b,
        M,
        N,
        K,
        R,
        0 if bias is None else bias.stride(0),
        *s.stride(),
        *b.stride(),
        DTYPE=TRITON_DTYPE[x.dtype],
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        LOW_RANK_PRECISION=dot_precision(s.dtype, x.dtype, x.dtype),
        HAS_BIAS=bias is not None,
        W_ROWS_OVER_K=w_rows_over_k,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        S_STEP=step_of(R, s.stride(0)),
        B_STEP=step_of(b.stride(-2)),
        GROUP_M=config.GROUP_M,
        NUM_PROGRAMS=programs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(configs.leave_registers(config) if beside else {}),
    )
