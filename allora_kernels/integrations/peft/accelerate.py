"""Plain LoRA of an existing PeftModel by the fused kernels, in place, and back."""

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...layer import bases
from ...models.adapt import check_gradients_pass
from .dispatch import fused_class, peft_class
from .fused import FusedLoraLayer
from .report import PeftReport, explain, reason_to_leave
from .ruled import RuledLoraLayer

_MAY_PACK = "_allora_may_pack"
"""Attribute of a Linear4bit that `accelerate_lora` keeps from packing its weight."""


def accelerate_lora(model: nn.Module) -> PeftReport:
    """Switch the LoRA layers of `model` to the fused kernels, in place.

    Only the class of a layer changes: parameters, names, hooks, state_dict and whatever an optimizer holds stay, and so do
    the results of disabling, merging, several adapters and the rest of PEFT. Any alpha and rsLoRA. May be called again.

    Layers on quantized bases of bitsandbytes and torchao are switched, too. No Linear4bit of the model packs its weight for the
    CPU in eval mode any more, as the packed one has no backward pass and coarser scales; a warning says of those that have.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside, prepared by a Trainer or not.

    Returns:
        PeftReport: what runs each layer now, and which are left alone and why (dropout, DoRA, other quantized bases, ...).

    Raises:
        ValueError: the model has no LoRA layers.
    """
    report = explain(model)
    check_gradients_pass(model, refuse=False)
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, FusedLoraLayer) and reason_to_leave(module) is None:
            module.__class__ = fused_class(type(module))
        if bases.keep_backward(module):
            # Also of a layer without an adapter, through which another's gradient goes.
            setattr(module, _MAY_PACK, True)
    return explain(model) if report.pefts else report


def restore_lora(model: nn.Module) -> None:
    """Undo `accelerate_lora`: PEFT's own class for every layer it switched, and a Linear4bit may pack its weight again. ALLoRA
    layers are left alone."""
    for module in model.modules():
        if isinstance(module, FusedLoraLayer) and not isinstance(module, RuledLoraLayer):
            module.__class__ = peft_class(module)
        if module.__dict__.pop(_MAY_PACK, False):
            bases.let_pack(module)
