"""Quantized linear layers of other libraries that can carry an adapter: bitsandbytes' modules, transformers' FP8Linear, and
`nn.Linear` with one of torchao's weight-only tensors. Told by their names, so that no library is imported here."""

import math
import sys

import torch
from torch import Tensor, nn

from .zero import whole_shape

_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")
_TORCHAO = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
# Of torchao's weights: what is set where the activations are quantized too, which autograd does not see through.
_QUANTIZES_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
_DAMAGE = "_allora_damage"
"""Attribute of a layer: why its weight is lost, once that was seen. Another cast may make the dtype right again."""
_FP8_DTYPE = "_allora_fp8_dtype"
"""Attribute of an FP8Linear with an adapter: its weight's dtype. In a wider one it multiplies by the weight without scales."""


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _bitsandbytes_class(module: nn.Module) -> type | None:
    """The class of bitsandbytes whose forward pass `module` runs."""
    for cls in type(module).__mro__:
        if _library(cls) == "bitsandbytes" and cls.__name__ in _BITSANDBYTES:
            return cls if type(module).forward is cls.forward else None
    return None


def _torchao_weight(module: nn.Module) -> Tensor | None:
    """The weight of `module` where it is a plain nn.Linear with one of torchao's tensors."""
    weight = module._parameters.get("weight")
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return weight if plain and weight is not None and _library(type(weight)) == "torchao" else None


def _fp8_class(module: nn.Module) -> type | None:
    """transformers' FP8Linear where `module` runs its forward pass on a weight of one byte each, or of two numbers a byte."""
    for cls in type(module).__mro__:
        if _library(cls) == "transformers" and cls.__name__ == "FP8Linear":
            return cls if type(module).forward is cls.forward and module.weight.element_size() == 1 else None
    return None


def kind_of(module: nn.Module) -> str | None:
    """What computes the products of `module`, as ``"bitsandbytes Linear4bit"``; None unless it is one of the layers above."""
    if _fp8_class(module) is not None:
        return "transformers FP8Linear"
    if (cls := _bitsandbytes_class(module)) is not None:
        return f"bitsandbytes {cls.__name__}"
    if (weight := _torchao_weight(module)) is not None:
        return f"torchao {type(weight).__name__}"
    return None


def name_of(module: nn.Module) -> str:
    """What computes the products of any `module`, in words."""
    return kind_of(module) or type(module).__name__


def obstacle_of(module: nn.Module) -> str | None:
    """Why a layer that has a `kind_of` gives its input no gradient, or a wrong one; None where the gradient is right."""
    if (cls := _fp8_class(module)) is not None:
        if module.weight.dtype == torch.int8:
            return "transformers FP8Linear with a weight in 4 bits, which has no backward pass"
        if not hasattr(sys.modules[cls.__module__], "FP8LinearFunction"):
            return "transformers FP8Linear of a version that gives it no backward pass: a newer one does, as 5.23"
        return None
    weight = _torchao_weight(module)
    if weight is None:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            return (
                f"{kind_of(module)} that an inference pass in eval mode has packed for this CPU, which has no backward pass: "
                "load the model anew and adapt it before it is called"
            )
        return damage_of(module)
    if type(weight).__name__ not in _TORCHAO:
        return (
            f"{kind_of(module)} weight, none of those known to give the layer's input a gradient: quantize with "
            "torchao >= 0.18 and Int8WeightOnlyConfig, Float8WeightOnlyConfig or IntxWeightOnlyConfig(weight_dtype=torch.int4)"
        )
    if any(getattr(weight, attribute, None) is not None for attribute in _QUANTIZES_ACTIVATIONS):
        return (
            f"{kind_of(module)} weight that quantizes the activations too, so that the layer's input gets no gradient: use a "
            "weight-only configuration"
        )
    return None


_LEAVE_OUT = "leave the frozen layers out, by fully_shard(..., ignored_params=set(layer.base_layer.parameters()))"


def damage_of(module: nn.Module) -> str | None:
    """Why `module` cannot compute with its quantized weight any more, since it was sharded or cast; None where it can."""
    if (reason := module.__dict__.get(_DAMAGE) or _cast_of(module)) is not None:
        return reason
    cls = _bitsandbytes_class(module)
    if cls is None or cls.__name__ != "Linear8bitLt" or hasattr(module.weight, "CB"):
        return None
    return f"bitsandbytes Linear8bitLt whose weight is a {type(module.weight).__name__} without scales: {_LEAVE_OUT}"


def _cast_of(module: nn.Module) -> str | None:
    """Which cast has destroyed the weight of `module`; None where its dtype is the one that it was stored in."""
    if (dtype := module.__dict__.get(_FP8_DTYPE)) is not None:
        what, remedy = "transformers FP8Linear whose weight", "never cast it"
    elif (cls := _bitsandbytes_class(module)) is not None and cls.__name__ == "Linear4bit":
        if getattr(module.weight, "quant_state", None) is None and getattr(module, "quant_state", None) is None:
            return None  # Not quantized yet: moving it to a device does that.
        dtype = getattr(module.weight, "quant_storage", module.quant_storage)
        what = "bitsandbytes Linear4bit whose packed weight"
        remedy = f"never cast it; for FSDP2 take param_dtype={dtype}, or {_LEAVE_OUT}"
    else:
        return None
    if module.weight.dtype == dtype:
        return None
    return f"{what} was cast from {dtype} to {module.weight.dtype}, which destroys it: {remedy}"


def watch_casts(module: nn.Module) -> None:
    """Know from here on what a cast does to the weight of `module`, if `keep_damage` is called after each."""
    if _fp8_class(module) is not None:
        setattr(module, _FP8_DTYPE, module.weight.dtype)


def keep_damage(module: nn.Module) -> None:
    """Remember a cast that has destroyed the weight of `module`, whatever comes after it."""
    if (reason := _cast_of(module)) is not None:
        module.__dict__.setdefault(_DAMAGE, reason)


def keep_backward(module: nn.Module) -> bool:
    """Keep a bitsandbytes Linear4bit from packing its weight for the CPU in eval mode: what it packs has no backward pass any
    more, without a word, and coarser scales. Whether it would have packed."""
    # Its own attribute: some wrappers of other libraries raise at any that they are asked for.
    packs = module.__dict__.get("support_avx512bf16_for_cpu", False)
    if packs:
        module.support_avx512bf16_for_cpu = False
    return packs


def let_pack(module: nn.Module) -> None:
    """Undo `keep_backward` where that returned True."""
    module.support_avx512bf16_for_cpu = True


def intercepted(module: nn.Module) -> bool:
    """Whether something waits for this module's calls or stands in their place: what computes without them passes it by."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def gives_own_tensors(module: nn.Module) -> bool:
    """Whether nothing else holds the tensors that `module` returns, forward and backward, so that they can be written to: the
    layers above, unless a hook might keep one."""
    hooked = intercepted(module) or nn.modules.module._has_any_global_hook()
    return not hooked and kind_of(module) is not None and obstacle_of(module) is None


def wrong_dtype(module: nn.Module, x: Tensor) -> str | None:
    """Why `module` would compute garbage for the dtype of x, without a word; None where it would not."""
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        return None
    if kind_of(module) == "bitsandbytes Linear4bit" and module.compute_dtype is None:
        return (
            "x is torch.float64, for which bitsandbytes Linear4bit computes garbage where it was not told its compute_dtype: "
            "cast x, or load the model with bnb_4bit_compute_dtype"
        )
    return None


def settle_compute_dtype(module: nn.Module, x: Tensor) -> None:
    """Let a bitsandbytes Linear4bit that was not told its `compute_dtype` take it from x, as its own first call does."""
    if not getattr(module, "compute_type_is_set", True):
        module.set_compute_type(x)
        module.compute_type_is_set = True


def numel(parameter: Tensor) -> int:
    """The number of weights in `parameter`, of which bitsandbytes packs several into an element."""
    state = getattr(parameter, "quant_state", None)
    return whole_shape(parameter).numel() if state is None else math.prod(state.shape)


def nbytes(t: Tensor) -> int:
    """The bytes of `t` and, of a weight that bitsandbytes packs in 4 bits, of its scales, which are no parameters."""
    state = getattr(t, "quant_state", None)
    states = [s for s in (state, getattr(state, "state2", None)) if s is not None]
    return t.nbytes + sum(s.absmax.nbytes for s in states)


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a weight in 16 bits or more, else float32; also of one in few bits that lie in a floating-point dtype."""
    weight = getattr(module, "weight", None)
    wide = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
    wide = wide and getattr(weight, "quant_state", None) is None
    return weight.dtype if wide else torch.float32


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that `module` computes in where it says one (Linear4bit), else `weight_dtype`."""
    stated = getattr(module, "compute_dtype", None)
    return stated if isinstance(stated, torch.dtype) else weight_dtype(module)
