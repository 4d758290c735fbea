"""The fused layers on bitsandbytes' modules. Imports bitsandbytes, as PEFT's own do: only `dispatch` imports this file."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from .calls import QuantizedBase
from .fused import FusedLoraLayer
from .ruled import RuledLoraLayer


class FusedLoraLinear4bit(FusedLoraLayer, Linear4bit):
    """`peft.tuners.lora.bnb.Linear4bit`, fused: plain LoRA with any scaling."""

    base_kind = QuantizedBase


class ALLoRALinear4bit(RuledLoraLayer, FusedLoraLinear4bit):
    """`FusedLoraLinear4bit` whose adapters train by ALLoRA's rule."""


class FusedLoraLinear8bitLt(FusedLoraLayer, Linear8bitLt):
    """`peft.tuners.lora.bnb.Linear8bitLt`, fused: plain LoRA with any scaling."""

    base_kind = QuantizedBase


class ALLoRALinear8bitLt(RuledLoraLayer, FusedLoraLinear8bitLt):
    """`FusedLoraLinear8bitLt` whose adapters train by ALLoRA's rule."""
