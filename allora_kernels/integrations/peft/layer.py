"""The fused layers on nn.Linear and Conv1D."""

from peft.tuners.lora.layer import Linear

from .calls import DenseBase
from .fused import FusedLoraLayer
from .ruled import RuledLoraLayer


class FusedLoraLinear(FusedLoraLayer, Linear):
    """`peft.tuners.lora.layer.Linear` around an nn.Linear or Conv1D, fused: plain LoRA with any scaling."""

    base_kind = DenseBase


class ALLoRALinear(RuledLoraLayer, FusedLoraLinear):
    """`FusedLoraLinear` whose adapters train by ALLoRA's rule."""
