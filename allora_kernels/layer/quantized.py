"""An adapter on a layer of another library, in one of two ways: the kernels take the product over, by the weight that the layer
would dequantize, with the adapter in it; or the layer computes its own product and the kernels add the adapter to it."""

import torch
from torch import Tensor, nn

from . import backend as _backend
from . import bases, batch_invariance, dequantizing, functional
from .added import add_adapter, check_input
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
        TypeError, ValueError, RuntimeError: as `add_adapter` does.
    """
    check_input(x, lora_A, lora_B)
    functional.check_rule(lora_A.shape[0], eta, norm)
    own = bases.gives_own_tensors(module)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if own and not transformed and not is_sharded(x):
        bases.settle_compute_dtype(module, x)
        weight = dequantizing.packed_weight(module, x.dtype)
        widest = functional.compute_dtype(x, lora_A, lora_B)
        if _obstacle(module, weight, own, x.numel() // x.shape[-1], x.dtype, x.device, widest) is None:
            return _dequantized(module, weight, x, lora_A, lora_B, widest, eta, norm, sink)
    return add_adapter(module, x, lora_A, lora_B, eta, norm, own, sink)


def _dequantized(module, weight: PackedWeight, x, lora_A, lora_B, widest, eta, norm, sink) -> Tensor:
    bias = None if module.bias is None else module.bias.to(weight.dtype)
    dtype = functional.autocast_dtype(x.device.type, x.dtype) or widest
    backend = functional.choose_backend(x, widest, None)
    rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
    y, _ = functional.apply_function(rows, weight, bias, lora_A, lora_B, dtype, eta, norm, backend, sink)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y.to(x.dtype) if weight.returns_dtype_of_x else y


def frozen_product(module: nn.Module, x: Tensor) -> tuple[PackedWeight, Tensor | None]:
    """The weight and the bias of a `module` that `can_be_taken_over`, for an x of this dtype."""
    bases.settle_compute_dtype(module, x)
    weight = dequantizing.packed_weight(module, x.dtype)
    return weight, None if module.bias is None else module.bias.to(weight.dtype)


def can_be_taken_over(module: nn.Module) -> bool:
    """Whether what `module` computes is a product with a weight that it dequantizes, and nothing else waits for its calls."""
    return bases.gives_own_tensors(module) and dequantizing.packed_weight(module, torch.float32) is not None


def obstacle(
    module: nn.Module, rows: int, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype
) -> str | None:
    """Why `module` computes its own product of `rows` rows of `dtype`, eagerly; None where the kernels take it over."""
    weight, widest = dequantizing.packed_weight(module, dtype), torch.promote_types(dtype, adapter_dtype)
    return _obstacle(module, weight, bases.gives_own_tensors(module), rows, dtype, device, widest)


def _obstacle(module, weight: PackedWeight | None, own: bool, rows, dtype, device, widest) -> str | None:
    if weight is None:
        return "it is not known to multiply by a dequantized weight"
    if not own:
        return "it has hooks, or its weight is damaged"
    cast_to = functional.autocast_dtype(device.type, dtype)
    if weight.dtype != (cast_to or dtype):
        return f"it computes in {weight.dtype} and {f'autocast in {cast_to}' if cast_to else f'x is {dtype}'}"
    if module.bias is not None and module.bias.requires_grad:
        return "its bias is trained"
    choice = _backend.choose(device, widest)
    if choice.name != "triton":
        return choice.reason
    if rows < DEQUANTIZED_FROM_ROWS and not batch_invariance.enabled():
        return f"{rows} rows are fewer than {DEQUANTIZED_FROM_ROWS}"
    return None


def explain(
    module: nn.Module, rows: int, r: int, norm: str | None, device: torch.device, adapter_dtype: torch.dtype
) -> Explanation:
    """The `Explanation` of a call on `rows` rows in the dtype that `module` computes in, as far as it says."""
    dtype, kind = bases.compute_dtype(module), bases.name_of(module)
    call = (rows, module.out_features, module.in_features, r, norm, device, dtype, adapter_dtype)
    reason = obstacle(module, rows, dtype, device, adapter_dtype)
    if reason is None:
        return explain_dequantized(kind, *call)
    return explain_wrapped(*call, kind, reason, bases.gives_own_tensors(module))
