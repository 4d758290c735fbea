"""``y = x Wᵀ + bias + S Bᵀ``: one GEMM, the low-rank product as its epilogue. By strides also ``dX = g W + dS A``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, parts, plans
from .chain import Counted, chained
from .configs import Config, cdiv
from .fused_linear_persistent import describable, launch_persistent
from .launching import launch
from .low_rank_add import low_rank_product
from .tiling import TRITON_DTYPE, add_low_rank, dot, dot_precision, grouped_tile, in_steps, narrow, offsets, step_of


@triton.jit(do_not_specialize=["M"])
def _fused_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ar,
    stride_ak,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK_DTYPE: tl.constexpr,
    S_PRECISION: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    S_INSIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    S_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y = x Wᵀ + bias + S Bᵀ`` for x [M, K], W [N, K], bias [N], S [M, R], B [N, R], y [M, N].

    One program writes one [BLOCK_M, BLOCK_N] tile of y, rounded once from the fp32 accumulator. S_INSIDE (R <= BLOCK_R):
    every program also computes its rows of ``S = x Aᵀ``, A [R, K], and the first column of tiles writes them.
    """
    R, stride_sm, stride_bn = in_steps(R, S_STEP), in_steps(stride_sm, S_STEP), in_steps(stride_bn, B_STEP)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = offsets(pid_m * BLOCK_M, BLOCK_M)
    offs_n = offsets(pid_n * BLOCK_N, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    offs_k = offsets(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if S_INSIDE:
        offs_r = offsets(0, BLOCK_R)
        mask_r = offs_r < R
        a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
        acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x, mask_w = mask_m[:, None], mask_n[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < K
            mask_x, mask_w = mask_x & mask_k[None, :], mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc, DTYPE, PRECISION)
        if S_INSIDE:
            mask_a = mask_r[None, :]
            if not EVEN_K:
                mask_a = mask_a & mask_k[:, None]
            a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # [BLOCK_K, BLOCK_R]
            acc_s = dot(x, a, acc_s, LOW_RANK_DTYPE, S_PRECISION)
            a_ptrs += step * stride_ak
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk

    if S_INSIDE:
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        s = narrow(acc_s, LOW_RANK_DTYPE)
        acc = dot(s, b, acc, LOW_RANK_DTYPE, LOW_RANK_PRECISION)
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
        if pid_n == 0:
            tl.store(s_ptrs, s, mask=mask_m[:, None] & mask_r[None, :])
    else:
        acc = add_low_rank(
            acc,
            (s_ptr, stride_sm, stride_sr),
            (b_ptr, stride_bn, stride_br),
            offs_m,
            offs_n,
            mask_m,
            mask_n,
            R,
            LOW_RANK_DTYPE,
            LOW_RANK_PRECISION,
            BLOCK_R,
        )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])


def launch_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, s: Tensor, b: Tensor, config: Config
) -> Tensor:
    """y, by one program a tile. With a [R, K] also fills s, which is read otherwise."""
    (M, K), N, R = x.shape, weight.shape[0], s.shape[1]
    y = torch.empty(M, N, device=x.device, dtype=x.dtype)
    launch(
        _fused_linear_kernel,
        (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),),
        x,
        weight,
        bias,
        a,
        s,
        b,
        y,
        M,
        N,
        K,
        R,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0) if a is None else a.stride()),
        *s.stride(),
        *b.stride(),
        *y.stride(),
        DTYPE=TRITON_DTYPE[x.dtype],
        PRECISION=dot_precision(x.dtype, x.dtype, x.dtype),
        LOW_RANK_DTYPE=TRITON_DTYPE[s.dtype],
        S_PRECISION=dot_precision(s.dtype, x.dtype, s.dtype),
        LOW_RANK_PRECISION=dot_precision(s.dtype, x.dtype, x.dtype),
        HAS_BIAS=bias is not None,
        S_INSIDE=a is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.BLOCK_R,
        S_STEP=step_of(R, s.stride(0)),
        B_STEP=step_of(b.stride(-2)),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def launch_by_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    plan: plans.Plan,
    beside: bool = False,
    counted: Counted | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill y by a plan of `plans.PERSISTENT`; `beside` as in `launch_persistent`, but that factors that go in parts are written
    by one more kernel of the chain in front of the GEMM, which then is "midway"; `counted` as in `launch_pipelined`.

    Returns the factors that the GEMM reads, for a chain that goes on to hold: what runs beside it must not get their memory.
    """
    if plan.way == "persistent":
        launch_persistent(x, weight, bias, s, b, y, plan.config, beside)
        return s, b
    # Here, as a Triton may have another Gluon (`plans.options`).
    from .fused_linear_pipelined import launch_pipelined

    if parts.possible(x.dtype, s.dtype):
        s, b = parts.in_parts(s, b)
    launch_pipelined(x, weight, bias, s, b, y, plan.config, beside, counted)
    return s, b


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, plan: plans.Plan | None = None
) -> Tensor:
    """``y = x Wᵀ + bias + S Bᵀ [M, N]`` in x's dtype; ``(g, Wᵀ, None, ds, Aᵀ)`` gives ``dX = g W + dS A``.

    x [M, K] and weight [N, K] share a dtype; s [M, R] sets the one of the low-rank product; any strides. `plan` is
    chosen where none is given.
    """
    (M, K), N, R = x.shape, weight.shape[0], s.shape[1]
    if M == 0:
        return torch.empty(0, N, device=x.device, dtype=x.dtype)
    if plan is None:
        call = plans.Call("fused_linear", M, N, K, R, x.dtype, s.dtype)
        plan = plans.pick(call, x.device, describable(x, weight, b, s))
    if plan.way == "vendor":
        # The vendor's GEMM reads what it adds to while its matrix units work: that costs less than to add to its result.
        return low_rank_product(s, b, bias, x.dtype).addmm_(x, weight.mT)
    if plan.way in plans.PERSISTENT:
        y = torch.empty(M, N, device=x.device, dtype=x.dtype)
        overlap = plans.takes_parts(plan.way, x.dtype, s.dtype) and configs.can_overlap(x.device)
        with chained(overlap, "midway"):
            launch_by_plan(x, weight, bias, s, b, y, plan, beside=overlap)
        return y
    return launch_tiles(x, weight, bias, None, s, b, plan.config)
