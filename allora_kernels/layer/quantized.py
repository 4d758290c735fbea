"""An adapter on a layer of another library, in one of two ways: the kernels take the product over, by the weight that the layer
would dequantize, with the adapter in it; or the layer computes its own product and the kernels add the adapter to it."""

import functools
import warnings

import torch
from torch import Tensor, nn

from . import backend as _backend
from . import bases, batch_invariance, dequantizing, functional
from .added import add_adapter
from .dequantizing import PackedWeight
from .explanation import Explanation, explain_dequantized, explain_wrapped
from .sharding import is_sharded

DEQUANTIZED_FROM_ROWS = 512
"""For fewer rows libraries have kernels that read the packed weight; bitsandbytes takes its own up to some 512 on an H100."""


def linear(
    module: nn.Module, x: Tensor, lora_A: Tensor, lora_B: Tensor, eta: float, norm: str | None, sink=None
) -> Tensor:
    """``module(x) + (x Aᵀ) Bᵀ [..., N]`` for x [..., K], with ALLoRA's gradients of lora_A and lora_B.

    Args:
        sink: what takes the step `adapter_grads` over to see more of it.

    Raises:
        TypeError: x is no floating-point tensor, or the layer returns none.
        ValueError: shapes that do not fit, mixed devices, or an x in float64 that the layer would compute garbage for.
        RuntimeError: `use_batch_invariant` is on and the layer computes its own product; and what `add_adapter` raises it for.
    """
    _check_input(x, lora_A, lora_B)
    functional.check_rule(lora_A.shape[0], eta, norm)
    own = bases.gives_own_tensors(module)
    check_call(module, x, own)
    reason = None
    # First, as a compiled call is not to be compiled again for another number of rows.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_sharded(x):
        reason = "the call is compiled, transformed or sharded"
    elif _enough(x.numel() // x.shape[-1]):
        choice = _backend.choose(x.device, functional.compute_dtype(x, lora_A, lora_B))
        weight = dequantizing.packed_weight(module, x.dtype, choice.name == "triton")
        reason = _obstacle(module, weight, own, choice)
        if reason is None and (reason := _other_dtype(weight, x.dtype, x.device)):
            _warn_of_dtype(bases.name_of(module), reason)
        if reason is None:
            return _dequantized(module, weight, x, lora_A, lora_B, eta, norm, sink)
    if batch_invariance.enabled():
        raise RuntimeError(
            f"use_batch_invariant is on, but {bases.name_of(module)} computes its own product, whose rows depend on the batch "
            f"({reason}): call use_batch_invariant(False), or adapt a layer that the kernels multiply by"
        )
    return add_adapter(module, x, lora_A, lora_B, eta, norm, own, sink)


def check_call(module: nn.Module, x: Tensor, own: bool = False) -> None:
    """RuntimeError or ValueError where `module` would compute garbage. `own`: whether it `gives_own_tensors`."""
    if not own and (reason := bases.damage_of(module)):
        raise RuntimeError(f"the frozen layer: {reason}")
    if reason := bases.wrong_dtype(module, x):
        raise ValueError(reason)


def _check_input(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point Tensor, got {found}")
    (r, k), n = lora_A.shape, lora_B.shape[0]
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., K] with K = {k} as in lora_A {[r, k]}, got {list(x.shape)}")
    if tuple(lora_B.shape) != (n, r):
        raise ValueError(f"lora_B must be [N, R] with R = {r} as in lora_A {[r, k]}, got {list(lora_B.shape)}")
    for name, t in (("lora_A", lora_A), ("lora_B", lora_B)):
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move them to one device")


def _enough(rows: int) -> bool:
    return rows >= DEQUANTIZED_FROM_ROWS or batch_invariance.enabled()


def _dequantized(module, weight: PackedWeight, x, lora_A, lora_B, eta, norm, sink) -> Tensor:
    N, K = weight.shape
    if x.shape[-1] != K or lora_B.shape[0] != N:
        raise ValueError(
            f"x must be [..., {K}] and lora_B [{N}, R] for {bases.name_of(module)} [{N}, {K}], got {list(x.shape)} and "
            f"{list(lora_B.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"the weight is on {weight.device} but x is on {x.device}; move them to one device")
    bases.settle_compute_dtype(module, x)
    dtype = functional.autocast_dtype(x.device.type, x.dtype) or functional.compute_dtype(x, lora_A, lora_B)
    rows = x.to(weight.dtype).reshape(-1, K)
    y = functional.apply_function(rows, weight, _bias(module, weight), lora_A, lora_B, dtype, eta, norm, "triton", sink)
    y = y.reshape(*x.shape[:-1], N)
    return y.to(x.dtype) if weight.returns_dtype_of_x else y


def _bias(module: nn.Module, weight: PackedWeight) -> Tensor | None:
    return None if module.bias is None else module.bias.to(weight.dtype)


def _obstacle(module: nn.Module, weight: PackedWeight | None, own: bool, choice: _backend.Choice) -> str | None:
    """Why `module` computes its own product, whatever x's rows and dtype; None where the kernels can take it over.

    Args:
        own: what `bases.gives_own_tensors` says of it.
        choice: the backend for the widest dtype among x and the adapter's factors.
    """
    if weight is None:
        return "it is not known to multiply by a dequantized weight"
    if not own:
        return "it has hooks, or its weight is damaged"
    if module.bias is not None and module.bias.requires_grad:
        return "its bias is trained"
    return None if choice.name == "triton" else choice.reason


def _other_dtype(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """How the dtype that a layer computes in differs from an x of `dtype`, or from autocast's; None where it does not."""
    cast_to = functional.autocast_dtype(device.type, dtype)
    if weight.dtype == (cast_to or dtype):
        return None
    return f"it computes in {weight.dtype} and {f'autocast in {cast_to}' if cast_to else f'x is {dtype}'}"


@functools.cache
def _warn_of_dtype(name: str, reason: str) -> None:
    """Once for each reason: it is the user's to change."""
    warnings.warn(
        f"allora_kernels: {name} computes its own product, to which the adapter is added, as {reason}; the kernels take the "
        "product over where the two are one (bitsandbytes: bnb_4bit_compute_dtype)",
        RuntimeWarning,
        stacklevel=4,
    )


def frozen_product(module: nn.Module, x: Tensor) -> tuple[PackedWeight, Tensor | None]:
    """The weight and the bias that `module` would multiply x by and add.

    Raises:
        ValueError: it is not known to multiply by a dequantized weight, has hooks, or computes in another dtype than x's, or
            autocast's.
        RuntimeError: its weight is damaged.
    """
    own = bases.gives_own_tensors(module)
    check_call(module, x, own)
    weight = dequantizing.packed_weight(module, x.dtype, _backend.choose(x.device, x.dtype).name == "triton")
    if weight is None or not own:
        raise ValueError(f"{bases.name_of(module)} has hooks, or a weight that is not known to be dequantized")
    if reason := _other_dtype(weight, x.dtype, x.device):
        raise ValueError(
            f"several adapters in a batch take the weight of {bases.name_of(module)} dequantized, and {reason}: load it to "
            "compute in the model's dtype (bitsandbytes: bnb_4bit_compute_dtype), or run each adapter's samples on their own"
        )
    bases.settle_compute_dtype(module, x)
    return weight, _bias(module, weight)


def can_be_taken_over(module: nn.Module) -> bool:
    """Whether what `module` computes is a product with a weight that it dequantizes, and nothing else waits for its calls."""
    return bases.gives_own_tensors(module) and dequantizing.packed_weight(module, torch.float32, False) is not None


def obstacle(
    module: nn.Module, rows: int, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype
) -> str | None:
    """Why `module` computes its own product of `rows` rows of `dtype`, eagerly; None where the kernels take it over."""
    choice = _backend.choose(device, torch.promote_types(dtype, adapter_dtype))
    weight = dequantizing.packed_weight(module, dtype, choice.name == "triton")
    reason = _obstacle(module, weight, bases.gives_own_tensors(module), choice)
    reason = reason or _other_dtype(weight, dtype, device)
    return reason or (None if _enough(rows) else f"{rows} rows are fewer than {DEQUANTIZED_FROM_ROWS}")


def explain(
    module: nn.Module, rows: int, r: int, norm: str | None, device: torch.device, adapter_dtype: torch.dtype
) -> Explanation:
    """The `Explanation` of a call on `rows` rows in the dtype that `module` computes in, as far as it says."""
    dtype, kind = bases.compute_dtype(module), bases.name_of(module)
    call = (rows, module.out_features, module.in_features, r, norm, device, dtype, adapter_dtype)
    reason = obstacle(module, rows, dtype, device, adapter_dtype)
    if reason is None:
        return explain_dequantized(kind, dequantizing.packed_weight(module, dtype, True).by, *call)
    return explain_wrapped(*call, kind, reason, bases.gives_own_tensors(module))
