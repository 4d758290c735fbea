"""ALLoRA fine-tuning at almost the cost of the frozen layer: fused Triton kernels behind a drop-in `nn.Linear`."""

from . import per_sample
from .layer.batch_invariance import use_batch_invariant
from .layer.functional import allora_linear
from .layer.linear import FusedALLoRALinear
from .models.adapt import AdaptReport, adapter_layers, adapter_parameters, apply_allora, merge_adapter
from .models.checkpoint import load_adapter, save_adapter

__all__ = [
    "AdaptReport",
    "FusedALLoRALinear",
    "adapter_layers",
    "adapter_parameters",
    "allora_linear",
    "apply_allora",
    "load_adapter",
    "merge_adapter",
    "per_sample",
    "save_adapter",
    "use_batch_invariant",
]
__version__ = "0.1.0"
