"""ALLoRA fine-tuning at almost the cost of the frozen layer: fused Triton kernels behind a drop-in `nn.Linear`."""

from . import per_sample
from .groups import Adapter, grouped_linear, multi_adapter_linear
from .layer.batch_invariance import use_batch_invariant
from .layer.functional import allora_linear
from .layer.linear import FusedALLoRALinear
from .layer.wrapped import WrappedALLoRALinear
from .models.adapt import apply_allora
from .models.adapted import (
    AdaptReport,
    active_adapter,
    adapter_layers,
    adapter_names,
    adapter_parameter_groups,
    adapter_parameters,
)
from .models.adapters import adapter_rows, add_adapter, remove_adapter, set_adapter
from .models.async_saving import PendingSave, save_adapters_async
from .models.disabling import disable_adapters, set_enabled
from .models.explained import explain
from .models.loading import load_adapter
from .models.merging import merge_adapter, unmerge_adapter
from .models.saving import save_adapter

__all__ = [
    "AdaptReport",
    "Adapter",
    "FusedALLoRALinear",
    "PendingSave",
    "WrappedALLoRALinear",
    "active_adapter",
    "adapter_layers",
    "adapter_names",
    "adapter_parameter_groups",
    "adapter_parameters",
    "adapter_rows",
    "add_adapter",
    "allora_linear",
    "apply_allora",
    "disable_adapters",
    "explain",
    "grouped_linear",
    "load_adapter",
    "merge_adapter",
    "multi_adapter_linear",
    "per_sample",
    "remove_adapter",
    "save_adapter",
    "save_adapters_async",
    "set_adapter",
    "set_enabled",
    "unmerge_adapter",
    "use_batch_invariant",
]
__version__ = "0.1.0"
