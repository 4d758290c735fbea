"""``S = x Aᵀ``: the skinny product, one pass over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_invariance, configs
from .beside import Beside
from .chain import end_round, join_chain
from .combine import combine_groups
from .configs import cdiv
from .launching import launch
from .tiling import TRITON_DTYPE, dot, dot_precision, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M", "PARTS"])
def _down_project_kernel(
    x_ptr,
    a_ptr,
    scale_ptr,
    s_ptr,
    under_way_ptr,
    M,
    K,
    R,
    PARTS,
    ROUNDS,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_scale,
    SPLIT_K,
    CHAIN: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_STEP: tl.constexpr,
    A_STEP: tl.constexpr,
):
    """``s[p] = x[:, part p] A[:, part p]ᵀ`` for x [M, K], A [R, K], contiguous s [P, M, R], part p = SPLIT_K columns of x;
    with HAS_SCALE also ``s[PARTS + p]``, of A times scale [K].

    One program writes a [BLOCK_M, BLOCK_R] tile of one part in each of ROUNDS rounds; accumulates in fp32. With HAS_SCALE both
    products are one, of 2 BLOCK_R columns. With counts the program is counted (`chain`).
    """
    join_chain(CHAIN, under_way_ptr, ROUNDS)
    R, stride_ak = in_steps(R, R_STEP), in_steps(stride_ak, A_STEP)
    offs_r = offsets(tl.program_id(1) * BLOCK_R, BLOCK_R)
    part = tl.program_id(2)
    mask_r = offs_r < R
    start = part * SPLIT_K
    stop = min(start + SPLIT_K, K)
    offs_k = offsets(start, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    # Of one round ROUNDS is a constant, and this is no loop.
    for i in range(0, ROUNDS):
        offs_m = offsets((i * tl.num_programs(0) + tl.program_id(0)) * BLOCK_M, BLOCK_M)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_R if HAS_SCALE else BLOCK_R), tl.float32)
        for k in range(start, stop, BLOCK_K):
            mask_k = (k + tl.arange(0, BLOCK_K)) < stop
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
            if HAS_SCALE:
                scale = tl.load(scale_ptr + (k + tl.arange(0, BLOCK_K)) * stride_scale, mask=mask_k, other=0.0)
                a = tl.join(a.to(tl.float32), a * scale[:, None]).reshape(BLOCK_K, 2 * BLOCK_R)
            acc = dot(x, a, acc, DTYPE, PRECISION)
            x_ptrs += step * stride_xk
            a_ptrs += step * stride_ak
        s_ptrs = s_ptr + (part.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
        if HAS_SCALE:
            acc, scaled = acc.reshape(BLOCK_M, BLOCK_R, 2).split()
            scaled_ptrs = s_ptrs + tl.full((), PARTS, tl.int64) * M * R
            tl.store(scaled_ptrs, narrow(scaled, OUT_DTYPE), mask=mask_m[:, None] & mask_r[None, :])
        tl.store(s_ptrs, narrow(acc, OUT_DTYPE), mask=mask_m[:, None] & mask_r[None, :])
        end_round(under_way_ptr, ROUNDS - 1 - i)


def down_project(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``S = x Aᵀ [M, R]`` in `dtype` (fp32, fp16 or bf16), for x [M, K] and a [R, K] of any strides."""
    return _project(x, a, None, dtype)[0]


def down_project_twice(x: Tensor, a: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``[x Aᵀ, x (A ⊙ scale)ᵀ] [2, M, R]`` in `dtype` from one pass over x, for scale [K] (fp32); else as `down_project`."""
    return _project(x, a, scale, dtype)


def down_project_beside(x: Tensor, a: Tensor, scale: Tensor | None, dtype: torch.dtype, beside: Beside) -> Tensor:
    """``[x Aᵀ] [1, M, R]``, or with a scale `down_project_twice`, by small programs beside which the other kernels of a chain
    have room. M >= 1, R <= BLOCK_R."""
    (M, K), R = x.shape, a.shape[0]
    s = torch.empty(1 if scale is None else 2, M, R, device=x.device, dtype=dtype)
    under_way = None if beside.counted is None else beside.counted.under_way
    _launch(x, a, scale, s, 1, K, dtype, beside.config, beside.rounds, under_way)
    return s


def _project(x: Tensor, a: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    (M, K), R, products = x.shape, a.shape[0], 1 if scale is None else 2
    if M == 0:
        return torch.empty(products, 0, R, device=x.device, dtype=dtype)
    arch = configs.arch_of(x.device)
    planned_rows = batch_invariance.planned_rows(M)
    op = "down_project" if scale is None else "down_project_twice"
    config = configs.pick_config(op, planned_rows, 0, K, R, x.dtype, arch, dtype)
    parts = configs.parts_of_k(config, planned_rows, K, R, arch)
    split_k = cdiv(cdiv(K, parts), config.BLOCK_K) * config.BLOCK_K
    parts = cdiv(K, split_k)
    s = torch.empty(products * parts, M, R, device=x.device, dtype=dtype if parts == 1 else torch.float32)
    _launch(x, a, scale, s, parts, split_k, dtype, config)
    return s if parts == 1 else combine_groups(s, products, parts, None, dtype)


def _launch(
    x: Tensor,
    a: Tensor,
    scale: Tensor | None,
    s: Tensor,
    parts: int,
    split_k: int,
    dtype: torch.dtype,
    config: configs.Config,
    rounds: int = 1,
    under_way: Tensor | None = None,
) -> None:
    (M, K), R, tiles = x.shape, a.shape[0], cdiv(x.shape[0], config.BLOCK_M)
    launch(
        _down_project_kernel,
        (tiles if rounds == 1 else configs.num_sms(x.device), cdiv(R, config.BLOCK_R), parts),
        x,
        a,
        scale,
        s,
        under_way,
        M,
        K,
        R,
        parts,
        rounds,
        *x.stride(),
        *a.stride(),
        0 if scale is None else scale.stride(0),
        split_k,
        DTYPE=TRITON_DTYPE[dtype],
        OUT_DTYPE=TRITON_DTYPE[s.dtype],
        PRECISION=dot_precision(dtype, x.dtype, dtype),
        HAS_SCALE=scale is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        R_STEP=step_of(R),
        A_STEP=step_of(a.stride(1)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
