"""Plain LoRA of an existing PeftModel by the fused kernels, in place, and back."""

from peft.tuners.lora.layer import Linear
from torch import nn

from .layer import FusedLoraLinear
from .report import PeftReport, explain, reason_to_leave


def accelerate_lora(model: nn.Module) -> PeftReport:
    """Switch the LoRA layers of `model` to the fused kernels, in place.

    Only the class of a layer changes: parameters, names, hooks, state_dict and whatever an optimizer holds stay, and so do
    the results of disabling, merging, several adapters and the rest of PEFT. Any alpha and rsLoRA. May be called again.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside, prepared by a Trainer or not.

    Returns:
        PeftReport: the layers that run fused, and those left alone and why (dropout, DoRA, quantized bases, ...).

    Raises:
        ValueError: the model has no LoRA layers.
    """
    report = explain(model)
    for module in model.modules():
        if type(module) is Linear and reason_to_leave(module) is None:
            module.__class__ = FusedLoraLinear
    return explain(model) if report.not_fused else report


def restore_lora(model: nn.Module) -> None:
    """Undo `accelerate_lora`: PEFT's own class for every layer it switched. ALLoRA layers are left alone."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = Linear
