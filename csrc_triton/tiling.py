"""What the kernels share: tile order, 64-bit offsets, dots and casts that mean the same on a GPU and in the interpreter."""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def offsets(start, BLOCK: tl.constexpr):
    """``start + [0, BLOCK)`` as int64: multiplied by a stride it may pass 2^31 elements."""
    return start + tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def in_steps(size, STEP: tl.constexpr):
    """`size`, known to be a multiple of STEP: by itself the compiler sees that of 16 alone, and loads rows of 8 elements one
    by one, from as many addresses."""
    return size // STEP * STEP


def step_of(*sizes: int) -> int:
    """The STEP of `in_steps` that all `sizes` are multiples of: 8 (as 16-bit elements a wide load), 4, 2 or 1; 1 where the
    compiler sees more by itself."""
    step = math.gcd(*sizes, 16)
    return 1 if step == 16 else step


INTERPRETED = tl.constexpr(not isinstance(offsets, triton.JITFunction))
"""Whether these kernels were built for Triton's interpreter (TRITON_INTERPRET=1 when they were first imported)."""


@triton.jit
def grouped_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of program `pid`, GROUP_M rows of tiles at a time so that neighbours in time share W's tiles in L2."""
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return first_m + within % rows, within // rows


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """The tile `t` in DTYPE, rounded to nearest even."""
    if INTERPRETED and (tl.bfloat16 == DTYPE and t.dtype != DTYPE):
        # The interpreter truncates to bf16, and takes a denormal to another number. So this is done on the bits.
        bits = t.to(tl.float32).to(tl.int32, bitcast=True)
        upper = bits >> 16
        rounded = upper + (((bits & 0xFFFF) + 0x7FFF + (upper & 1)) >> 16)
        return tl.where(t == t, rounded, upper | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return t.to(DTYPE)


@triton.jit
def added_apart(product, acc):
    """``acc + product`` for a dot's `product`, by one fp32 addition: of a plain sum the compiler makes the dot's own start."""
    return acc - (0.0 - product)


@triton.jit
def _dot_narrow(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    if INTERPRETED:
        # The interpreter multiplies bf16 as if it were an integer type; in fp32 the same products are exact.
        return tl.dot(narrow(a, DTYPE).to(tl.float32), narrow(b, DTYPE).to(tl.float32), acc)
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def _dot_split(a, b, acc, PARTS: tl.constexpr):
    """``acc + a b`` from bf16 dots: an fp32 operand is the sum of PARTS bf16 tiles, fp16 of two, bf16 is one.

    8 bits of mantissa a part: PARTS=3 is as exact as fp32, PARTS=2 leaves 2^-16, enough under a 16-bit result. An
    infinite operand gives nan.
    """
    total = acc
    if PARTS > 2:
        # Matrix units cut off what they add to a larger sum, always towards zero: over a long loop that is many times the
        # error of fp32. So this tile's product is summed up alone.
        acc = tl.zeros_like(acc)
    PARTS_A: tl.constexpr = 1 if a.dtype == tl.bfloat16 else (2 if a.dtype == tl.float16 else PARTS)
    PARTS_B: tl.constexpr = 1 if b.dtype == tl.bfloat16 else (2 if b.dtype == tl.float16 else PARTS)
    a0 = narrow(a, tl.bfloat16)
    b0 = narrow(b, tl.bfloat16)
    if PARTS_A > 1:
        rest_a = a.to(tl.float32) - a0.to(tl.float32)
        a1 = narrow(rest_a, tl.bfloat16)
    if PARTS_B > 1:
        rest_b = b.to(tl.float32) - b0.to(tl.float32)
        b1 = narrow(rest_b, tl.bfloat16)
    # Smallest products first, so that the sum loses least.
    if PARTS_A > 2:
        acc = _dot_narrow(rest_a - a1.to(tl.float32), b0, acc, tl.bfloat16, "ieee")
    if PARTS_B > 2:
        acc = _dot_narrow(a0, rest_b - b1.to(tl.float32), acc, tl.bfloat16, "ieee")
    if PARTS > 2 and PARTS_A > 1 and PARTS_B > 1:
        acc = _dot_narrow(a1, b1, acc, tl.bfloat16, "ieee")
    if PARTS_A > 1:
        acc = _dot_narrow(a1, b0, acc, tl.bfloat16, "ieee")
    if PARTS_B > 1:
        acc = _dot_narrow(a0, b1, acc, tl.bfloat16, "ieee")
    acc = _dot_narrow(a0, b0, acc, tl.bfloat16, "ieee")
    return acc + total if PARTS > 2 else acc


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b`` with fp32 accumulation, the operands in DTYPE; PRECISION as from `dot_precision`."""
    if PRECISION == "split3":
        return _dot_split(a, b, acc, 3)
    elif PRECISION == "split2":
        return _dot_split(a, b, acc, 2)
    elif tl.float32 == DTYPE:
        # A tile's products are summed up alone: one sum over a whole row would collect the rounding of all its terms.
        return added_apart(_dot_narrow(a, b, tl.zeros_like(acc), DTYPE, PRECISION), acc)
    else:
        return _dot_narrow(a, b, acc, DTYPE, PRECISION)


@triton.jit
def add_low_rank(
    acc,
    s,
    b,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    R,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc + S Bᵀ`` for the tile (offs_m, offs_n); the whole rank, BLOCK_R of it at a time.

    s and b are (pointer, stride of a row, stride of the rank) of S [M, R] and B [N, R].
    """
    s_ptr, stride_sm, stride_sr = s
    b_ptr, stride_bn, stride_br = b
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = offsets(r, BLOCK_R)
        mask_r = offs_r < R
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        s_tile = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_tile = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = dot(s_tile, b_tile, acc, DTYPE, PRECISION)
    return acc


@triton.jit
def sqrt_of_square(square):
    """The norm whose square was computed, where rounding may have taken it below 0; a nan stays one."""
    return tl.sqrt_rn(tl.where(square < 0.0, 0.0, square))


@triton.jit
def coefficient(n, inv_eta_squared):
    """``C = (n + 1/η²)^(-1/2)`` for norms n, correctly rounded at each step: a GPU's plain square root and quotient are not,
    and C at n = 0 would be off η by what they please."""
    return tl.div_rn(tl.full(n.shape, 1.0, tl.float32), tl.sqrt_rn(n + inv_eta_squared))


@triton.jit
def entry_coefficient(
    u,
    f,
    offs_m,
    offs_l,
    mask_m,
    mask_l,
    R,
    inv_eta_squared,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``C(|U Fᵀ|)`` for the tile (offs_m, offs_l), u and f as in `add_low_rank`: the coefficient of the rule "entry"."""
    product = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    product = add_low_rank(product, u, f, offs_m, offs_l, mask_m, mask_l, R, DTYPE, PRECISION, BLOCK_R)
    return coefficient(tl.abs(product), inv_eta_squared)


def dot_precision(dtype: torch.dtype, x_dtype: torch.dtype, out_dtype: torch.dtype) -> str:
    """How a dot in `dtype` is computed where one operand comes from x and the result is stored in `out_dtype`.

    fp32 is IEEE unless torch's own switch allows tf32. fp32 factors under a 16-bit x run on the 16-bit matrix units, split
    into as many bf16 parts as the result can show.
    """
    if dtype != torch.float32:
        return "ieee"
    if x_dtype != torch.float32:
        return "split3" if out_dtype == torch.float32 else "split2"
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
