"""Which class a LoRA layer has: by the target, and by PEFT's own class."""

from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layer import bases
from ...models.selection import obstacle
from .fused import FusedLoraLayer
from .layer import ALLoRALinear, FusedLoraLinear
from .ruled import RuledLoraLayer
from .torchao import ALLoRATorchaoLinear, FusedTorchaoLoraLinear


def fused_class(peft_class: type) -> type[FusedLoraLayer] | None:
    """What `accelerate_lora` makes of a layer of exactly this class of PEFT's; None where it leaves it alone."""
    if peft_class.__module__ == "peft.tuners.lora.bnb":
        from . import bnb

        return {bnb.Linear4bit: bnb.FusedLoraLinear4bit, bnb.Linear8bitLt: bnb.FusedLoraLinear8bitLt}.get(peft_class)
    return {Linear: FusedLoraLinear, TorchaoLoraLinear: FusedTorchaoLoraLinear}.get(peft_class)


def peft_class(layer: FusedLoraLayer) -> type:
    """The class of PEFT's that `layer` is one of."""
    return next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("peft."))


def _ruled_class(target: nn.Module) -> type[RuledLoraLayer] | None:
    kind = bases.kind_of(target)
    if kind is None:
        return ALLoRALinear
    if kind.startswith("torchao "):
        return ALLoRATorchaoLinear
    if not kind.startswith("bitsandbytes "):
        return None
    from . import bnb

    return {"Linear4bit": bnb.ALLoRALinear4bit, "Linear8bitLt": bnb.ALLoRALinear8bitLt}[kind.split()[1]]


def take_over(layer: nn.Module) -> None:
    """Let a layer of PEFT's own, as an adapter without a rule brings it, be one on which none trains without."""
    if fused_class(type(layer)) is not None:
        layer.__class__ = _ruled_class(layer.base_layer)
        layer.allora_eta, layer.allora_norm = {}, {}
        bases.keep_backward(layer.base_layer)


def cannot_be_ruled(called: str, reason: str) -> ValueError:
    """The error of a target that PEFT would train without a rule."""
    return ValueError(
        f"{called} cannot be ALLoRA ({reason}), and PEFT would train it as plain LoRA: leave it out, with "
        "exclude_modules=[...] or narrower target_modules"
    )


def make_layer(declared: Any, target: nn.Module, adapter_name: str, **kwargs: Any) -> RuledLoraLayer:
    """The layer that PEFT puts in `target`'s place, for the ALLoRAConfig `declared`.

    Raises:
        ValueError: an adapter here would not train by the rule, or not at all: the target is no plain linear layer and no
            quantized one that gives its input a gradient, or is adapted already; or the config was changed into one that ALLoRA
            has no meaning for.
    """
    config = kwargs.get("config", declared)
    config.check()
    name = kwargs.get("target_name", "")
    called = f"the target {name!r}" if name else f"a target, {target},"
    if isinstance(target, BaseTunerLayer):
        raise ValueError(f"{called} has adapters of another kind: merge_and_unload() them first")
    reason = obstacle(target, {target: []}) if kwargs.get("parameter_name") is None else "a parameter and not a layer"
    if reason is None and _ruled_class(target) is None:
        reason = f"no class for PEFT's layer on {bases.kind_of(target)}; apply_allora adapts it"
    if reason is not None:
        raise cannot_be_ruled(called, reason)
    conv = isinstance(target, Conv1D)
    if "config" in kwargs:
        config.fan_in_fan_out = conv
    else:
        kwargs["fan_in_fan_out"] = conv
    bases.keep_backward(target)
    layer = _ruled_class(target)(target, adapter_name, is_target_conv_1d_layer=conv, **kwargs)
    layer.set_rule(adapter_name, config.allora_eta, config.allora_norm)
    return layer
