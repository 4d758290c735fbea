"""The adapter's backward by fp32 atomics: an order of operations to compare with, not this library's.

It reads G as often as `csrc_triton.adapter_grads` does and needs no second stage, but the bits of its sums change from run
to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launching import launch
from csrc_triton.tiling import TRITON_DTYPE, dot, dot_precision, offsets

BLOCK_M, BLOCK_L, SEGMENT_M = 64, 64, 512
"""One program: BLOCK_L columns of SEGMENT_M rows, BLOCK_M at a time."""


@triton.jit(do_not_specialize=["M"])
def _sweep_atomics_kernel(
    v_ptr,
    u_ptr,
    f_ptr,
    outer_ptr,
    projected_ptr,
    M,
    L,
    R,
    stride_vm,
    stride_vl,
    PROJECT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENT_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``outer += Vᵀ U [L, R]`` and ``projected += V F [M, R]``, in fp32, for V [M, L]; contiguous U [M, R] and F [L, R].

    One program adds the part of BLOCK_L columns and SEGMENT_M rows of V, each tile of which it loads once.
    """
    offs_l = offsets(tl.program_id(0) * BLOCK_L, BLOCK_L)
    offs_r = offsets(0, BLOCK_R)
    mask_l = offs_l < L
    mask_lr = mask_l[:, None] & (offs_r < R)[None, :]
    lr = offs_l[:, None] * R + offs_r[None, :]
    start = tl.program_id(1) * SEGMENT_M
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for m in range(start, min(start + SEGMENT_M, M), BLOCK_M):
        offs_m = offsets(m, BLOCK_M)
        mask_m = offs_m < M
        mask_mr = mask_m[:, None] & (offs_r < R)[None, :]
        mr = offs_m[:, None] * R + offs_r[None, :]
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + offs_l[None, :] * stride_vl
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_M, BLOCK_L]
        if PROJECT:
            f = tl.load(f_ptr + lr, mask=mask_lr, other=0.0)  # [BLOCK_L, BLOCK_R]
            zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            tl.atomic_add(projected_ptr + mr, dot(v, f, zeros, DTYPE, PRECISION), mask=mask_mr, sem="relaxed")
        u = tl.load(u_ptr + mr, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = dot(tl.trans(v), u, acc, DTYPE, PRECISION)
    tl.atomic_add(outer_ptr + lr, acc, mask=mask_lr, sem="relaxed")


def _sweep(v: Tensor, u: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor | None]:
    (M, L), R = v.shape, u.shape[1]
    outer = torch.zeros(L, R, device=v.device, dtype=torch.float32)
    projected = None if f is None else torch.zeros(M, R, device=v.device, dtype=torch.float32)
    launch(
        _sweep_atomics_kernel,
        (triton.cdiv(L, BLOCK_L), triton.cdiv(M, SEGMENT_M)),
        v,
        u.contiguous(),
        None if f is None else f.contiguous(),
        outer,
        projected,
        M,
        L,
        R,
        *v.stride(),
        PROJECT=f is not None,
        DTYPE=TRITON_DTYPE[u.dtype],
        PRECISION=dot_precision(u.dtype, v.dtype, u.dtype),
        SEGMENT_M=SEGMENT_M,
        BLOCK_M=BLOCK_M,
        BLOCK_L=BLOCK_L,
        BLOCK_R=max(16, triton.next_power_of_2(R)),
        num_warps=4,
        num_stages=2,
    )
    return outer, projected


def adapter_grads(g: Tensor, x: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B [M, R]`` in s's dtype, ``dA = dSᵀ x [R, K]`` and ``dB = gᵀ S [N, R]`` in fp32: plain LoRA's."""
    db, ds = _sweep(g, s, b)
    ds = ds.to(s.dtype)
    da, _ = _sweep(x, ds, None)
    return ds, da.mT, db
