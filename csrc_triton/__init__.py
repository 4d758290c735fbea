"""The Triton kernels of the ALLoRA layer and their launchers. Needs torch and triton only; knows no autograd."""

from .adapted_linear import adapted_linear, adapted_linear_and_coefficient, hides_c
from .adapter_grad import adapter_grads
from .combine import combine
from .dequantize import dequantize_4bit
from .down_project import down_project
from .explaining import plan_added_steps, plan_steps
from .fused_linear import fused_linear
from .fused_linear_persistent import describable
from .grouped_adapter_grad import grouped_adapter_grads
from .grouped_down_project import grouped_down_project
from .grouped_fused_linear import grouped_fused_linear
from .grouped_low_rank_product import grouped_low_rank_product
from .grouped_sample_grad import grouped_sample_grads, grouped_sample_squared_norms
from .layer_grads import layer_grads
from .low_rank_add import low_rank_add
from .plans import LayerCall
from .replay import replayed
from .row_norms import token_coefficient, weight_coefficient
from .sample_grad import sample_grads, sample_squared_norms
from .segments import Segments

__all__ = [
    "LayerCall",
    "Segments",
    "adapted_linear",
    "adapted_linear_and_coefficient",
    "adapter_grads",
    "combine",
    "dequantize_4bit",
    "describable",
    "down_project",
    "fused_linear",
    "grouped_adapter_grads",
    "grouped_down_project",
    "grouped_fused_linear",
    "grouped_low_rank_product",
    "grouped_sample_grads",
    "grouped_sample_squared_norms",
    "hides_c",
    "layer_grads",
    "low_rank_add",
    "plan_added_steps",
    "plan_steps",
    "replayed",
    "sample_grads",
    "sample_squared_norms",
    "token_coefficient",
    "weight_coefficient",
]
