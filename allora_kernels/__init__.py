"""ALLoRA fine-tuning at almost the cost of the frozen layer: fused Triton kernels behind a drop-in `nn.Linear`."""

from .functional import allora_linear
from .linear import FusedALLoRALinear

__all__ = ["FusedALLoRALinear", "allora_linear"]
__version__ = "0.1.0"
