"""PEFT 0.18 and newer: ALLoRA as a real `PeftModel`, and any plain-LoRA `PeftModel` on the fused kernels."""

from .accelerate import accelerate_lora, restore_lora
from .config import ALLoRAConfig
from .fused import FusedLoraLayer
from .layer import ALLoRALinear, FusedLoraLinear
from .model import get_allora_model, load_allora_model
from .report import PeftReport, explain
from .ruled import RuledLoraLayer

__all__ = [
    "ALLoRAConfig",
    "ALLoRALinear",
    "FusedLoraLayer",
    "FusedLoraLinear",
    "PeftReport",
    "RuledLoraLayer",
    "accelerate_lora",
    "explain",
    "get_allora_model",
    "load_allora_model",
    "restore_lora",
]
