"""ALLoRA in plain torch: the specification every kernel is tested against.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``bias [N]``, ``lora_A [R, K]``, ``lora_B [N, R]``, ``s = x lora_Aᵀ [M, R]``,
``g = dL/dy [M, N]``. The ALLoRA paper (arXiv 2410.09692) writes the update as ``W + AB``; the letters here are PEFT's,
``W + BA``.

Two independent statements of the same layer live here. `allora_linear` says only where the coefficient C enters and
leaves every derivative to autograd. The steps (`down_project`, `fused_linear`, `weight_coefficient`, `adapter_grads`, ...)
write the derivatives out; the eager backend runs them, and each has a Triton kernel of the same name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("row", "matrix", "factor", "entry", "token", None)
WEIGHT_NORMS = ("row", "matrix", "factor")
"""Rules whose coefficient depends on lora_A and lora_B alone, so it changes once per optimizer step."""


def _at_least_fp32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# --- norms: none of them forms the N x K product BA -----------------------------------------------------------------


def gram(factor: Tensor) -> Tensor:
    """``F Fᵀ [R, R]`` of a factor ``F [R, L]``, in fp32 or better."""
    factor = _at_least_fp32(factor)
    return factor @ factor.mT


def row_norms(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``‖(BA)[i,:]‖ [N]``, from ``B[i,:] (A Aᵀ) B[i,:]ᵀ``."""
    return quadratic_norms(lora_B, gram(lora_A))


def quadratic_norms(v: Tensor, q: Tensor) -> Tensor:
    """``√(v[l,:] Q v[l,:]ᵀ) [L]`` for ``v [L, R]`` and a Gram matrix ``Q [R, R]``, in fp32 or better."""
    v = _at_least_fp32(v)
    return ((v @ q.to(v.dtype)) * v).sum(dim=-1).clamp_min(0).sqrt()


def matrix_norm(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``‖BA‖_F []``, from ``tr((BᵀB)(A Aᵀ))``."""
    return (gram(lora_B.mT) * gram(lora_A)).sum(dim=(-2, -1)).clamp_min(0).sqrt()


def factor_norms(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """``(‖A[j,:]‖ [R], ‖B[i,:]‖ [N])``."""
    return _at_least_fp32(lora_A).norm(dim=-1), _at_least_fp32(lora_B).norm(dim=-1)


def token_norms(s: Tensor, lora_B: Tensor) -> Tensor:
    """``‖(S Bᵀ)[m,:]‖ [M]``, from ``S[m,:] (BᵀB) S[m,:]ᵀ``."""
    return row_norms(lora_B.mT, s)


def entry_norms(s: Tensor, lora_B: Tensor) -> Tensor:
    """``|(S Bᵀ)[m,i]| [M, N]``."""
    dtype = torch.promote_types(torch.promote_types(s.dtype, lora_B.dtype), torch.float32)
    return (s.to(dtype) @ lora_B.to(dtype).mT).abs()


# --- the coefficient ------------------------------------------------------------------------------------------------


def coefficient(n: Tensor, eta: float, inv_eta_squared: Tensor | None = None) -> Tensor:
    """``C = (n + 1/η²)^(-1/2)`` for norms ``n`` of any shape (arXiv 2410.09692); exactly η where ``n = 0``. `inv_eta_squared`,
    where it is given, stands for ``1/η²``."""
    return (n + (eta**-2 if inv_eta_squared is None else inv_eta_squared)).rsqrt()


def weight_coefficient(
    lora_A: Tensor, lora_B: Tensor, eta: float, norm: str, inv_etas_squared: Tensor | None = None
) -> Tensor:
    """C of a weight-dependent rule, fp32 or better: ``"row"`` [N]; ``"matrix"`` [1]; ``"factor"`` [N + R], first the
    coefficients of lora_B's rows, then those of lora_A's. Factors of groups, with E in front, give them with E in front;
    `inv_etas_squared` [E] then stands for `eta`."""
    if norm == "row":
        n = row_norms(lora_A, lora_B)
    elif norm == "matrix":
        n = matrix_norm(lora_A, lora_B)[..., None]
    elif norm == "factor":
        norms_a, norms_b = factor_norms(lora_A, lora_B)
        n = torch.cat([norms_b, norms_a], dim=-1)
    else:
        raise AssertionError(f"norm={norm!r} has no weight-dependent coefficient")
    return coefficient(n, eta, None if inv_etas_squared is None else inv_etas_squared[:, None].to(n.dtype))


# --- the steps ------------------------------------------------------------------------------------------------------


def down_project(x: Tensor, lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """``S = x Aᵀ [M, R]`` in `dtype`; whatever else is low-rank is computed in S's dtype."""
    return x.to(dtype) @ lora_A.to(dtype).mT


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor) -> Tensor:
    """``y = x Wᵀ + bias + S Bᵀ [M, N]`` in x's dtype. With ``(g, Wᵀ, None, ds, Aᵀ)`` it is ``dX = g W + ds A``."""
    return F.linear(x, weight, bias) + (s @ lora_B.to(s.dtype).mT).to(x.dtype)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The forward pass: ``(y [M, N], S [M, R])``, y in x's dtype and S in `dtype`."""
    s = down_project(x, lora_A, dtype)
    return fused_linear(x, weight, bias, s, lora_B), s


def low_rank_add(y: Tensor, s: Tensor, lora_B: Tensor) -> None:
    """``y += S Bᵀ`` in place, for a ``y [M, N]`` that another library's layer computed."""
    y.add_((s @ lora_B.to(s.dtype).mT).to(y.dtype))


def scaled_operands(
    g: Tensor, s: Tensor, lora_B: Tensor, c: Tensor | None, eta: float, norm: str | None, need_da: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What C leaves to sum over tokens: (G~, S~, u, scale_a, scale_b), where ``dB = scale_b ⊙ G~ᵀ S~`` and
    ``dA = scale_a ⊙ uᵀ x``. u is None without `need_da`, a scale where C is not on that side.

    A coefficient that does not depend on the token leaves the sum, so it multiplies the small side (a row of B, dA or
    dB) and not g.
    """
    compute = s.dtype
    g, b = g.to(compute), lora_B.to(compute)
    scale_a = scale_b = c
    g_scaled, s_scaled, b_scaled, c_token = g, s, b, None
    if norm == "row":
        b_scaled, scale_a = (c[:, None] * lora_B).to(compute), None
    elif norm == "factor":
        scale_b, scale_a = c.split([lora_B.shape[0], s.shape[1]])
    elif norm == "token":
        c_token = coefficient(token_norms(s, lora_B), eta) if c is None else c
        scale_a = scale_b = None
        s_scaled = (c_token[:, None] * s).to(compute)
    elif norm == "entry":
        g_scaled = (coefficient(entry_norms(s, lora_B), eta) * g).to(compute)
    u = None
    if need_da:
        u = g_scaled @ b_scaled
        u = u if c_token is None else (c_token[:, None] * u).to(compute)
    return g_scaled, s_scaled, u, scale_a, scale_b


def scaled_sum(v: Tensor, w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``scale ⊙ vᵀ w`` in `dtype`, the sum over the rows of v and w; `scale` (None: ones) multiplies the result's rows."""
    total = v.mT @ w
    return (total if scale is None else scale[:, None] * total).to(dtype)


def adapter_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = g B [M, R]`` (in S's dtype), ``dA = (g~ B)ᵀ x [R, K]`` and ``dB = g~ᵀ S [N, R]`` with ``g~ = C ⊙ g``.

    `c` is `weight_coefficient`'s vector for the weight-dependent rules; for ``"token"`` [M] where lora_B has only some of
    the layer's rows; else None. dS is never rescaled: dX needs it
    as it is. A result whose `need_ds` is False or whose dtype is None is not computed and comes back empty; x may be
    None where `dtype_a` is.
    """
    ds = da = db = s.new_empty(0)
    g = g.to(s.dtype)
    if need_ds:
        ds = g @ lora_B.to(s.dtype)
    g_scaled, s_scaled, u, scale_a, scale_b = scaled_operands(g, s, lora_B, c, eta, norm, dtype_a is not None)
    if dtype_a is not None:
        da = scaled_sum(u, x.to(s.dtype), scale_a, dtype_a)
    if dtype_b is not None:
        db = scaled_sum(g_scaled, s_scaled, scale_b, dtype_b)
    return ds, da, db


def layer_grads(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    eta: float,
    norm: str | None,
    dtype_a: torch.dtype | None = None,
    dtype_b: torch.dtype | None = None,
    c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dX = g W + dS A [M, K]``, and dA and dB of `adapter_grads` in these dtypes (None: the factor's own), by the steps
    above; c where `weight_coefficient` has been called already."""
    if c is None and norm in WEIGHT_NORMS:
        c = weight_coefficient(lora_A, lora_B, eta, norm)
    dtypes = dtype_a or lora_A.dtype, dtype_b or lora_B.dtype
    ds, da, db = adapter_grads(g, x, s, lora_B, c, eta, norm, True, *dtypes)
    return fused_linear(g, weight.mT, None, ds, lora_A.mT), da, db


# --- a frozen weight in 4 bits -------------------------------------------------------------------------------------


def dequantize_4bit(
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scale_code: Tensor | None,
    scale_scales: Tensor | None,
    offset: Tensor | None,
    block: int,
    scale_block: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [n, k] in `dtype` that bitsandbytes stores as numbers of 4 bits (QLoRA, arXiv 2305.14314, section 3).

    `packed` (uint8) has two numbers a byte, the first in the upper half; each stands for an entry of `code` [16], times a scale
    for each `block` of them. scales [n k / block] is fp32; or uint8, where each stands for an entry of scale_code [256] times
    one of scale_scales for each `scale_block`, plus `offset` [].
    """
    numbers = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[: n * k]
    if scale_code is not None:
        scales = scale_code[scales.long()] * scale_scales.repeat_interleave(scale_block)[: len(scales)] + offset
    return (code[numbers.long()] * scales.repeat_interleave(block)[: n * k]).view(n, k).to(dtype)


# --- the whole layer, by autograd -----------------------------------------------------------------------------------


def _scale_gradient(t: Tensor, c: Tensor) -> Tensor:
    """The value of `t`; the gradient of `t` times the constant `c`."""
    return t.detach() + c.to(t.dtype) * (t - t.detach())


def allora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    eta: float = 2.0,
    norm: str | None = "row",
    scaling: float = 1.0,
) -> Tensor:
    """``y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ`` whose autograd gradients of lora_A and lora_B are ALLoRA's.

    Any leading dimensions, dtype and device; differentiable in x, lora_A and lora_B. Two copies of the low-rank
    branch are added: one carries the true gradient to x and treats the adapter as constant, the other, worth zero,
    carries the rescaled gradient to the adapter and treats x as constant. `scaling` is plain LoRA's alpha/r: ValueError
    unless it is 1 or `norm` is None.
    """
    if scaling != 1 and norm is not None:
        raise ValueError(f"scaling={scaling} with norm={norm!r}: only plain LoRA, norm=None, has a scaling")
    rows = x.reshape(-1, x.shape[-1])
    compute = torch.promote_types(x.dtype, torch.promote_types(lora_A.dtype, lora_B.dtype))
    a_const, b_const = lora_A.detach(), lora_B.detach()
    s_const = down_project(rows.detach(), a_const, compute)

    y = fused_linear(rows, weight, bias, scaling * down_project(rows, a_const, compute), b_const)

    if norm == "factor":
        c = weight_coefficient(a_const, b_const, eta, norm)[:, None]
        lora_B = _scale_gradient(lora_B, c[: lora_B.shape[0]])
        lora_A = _scale_gradient(lora_A, c[lora_B.shape[0] :])
    branch = scaling * down_project(rows.detach(), lora_A, compute) @ lora_B.to(compute).mT
    if norm in ("row", "matrix"):
        branch = _scale_gradient(branch, weight_coefficient(a_const, b_const, eta, norm))
    elif norm == "token":
        branch = _scale_gradient(branch, coefficient(token_norms(s_const, b_const), eta)[:, None])
    elif norm == "entry":
        branch = _scale_gradient(branch, coefficient(entry_norms(s_const, b_const), eta))
    y = y + (branch - branch.detach()).to(y.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])
