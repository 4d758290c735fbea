"""The fused layers on nn.Linear with a weight of torchao's. Imports no torchao, as PEFT's own does not until it merges."""

from typing import Any

from peft.tuners.lora.torchao import TorchaoLoraLinear

from .calls import QuantizedBase
from .fused import FusedLoraLayer
from .ruled import RuledLoraLayer


class FusedTorchaoLoraLinear(FusedLoraLayer, TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear`, fused: plain LoRA with any scaling."""

    base_kind = QuantizedBase

    def __init__(self, *args: Any, get_apply_tensor_subclass: Any = None, **kwargs: Any) -> None:
        # PEFT 0.18 has no default here.
        super().__init__(*args, get_apply_tensor_subclass=get_apply_tensor_subclass, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; ValueError unless PEFT was told how to quantize the sum again. PEFT 0.18 notices that half-way."""
        if self.get_apply_tensor_subclass is None:
            raise ValueError(
                "cannot merge into a weight of torchao's, as nothing says how it was quantized: load the model by transformers "
                "with a TorchAoConfig, or save_pretrained the adapter and merge it into the model without quantization"
            )
        super().merge(*args, **kwargs)


class ALLoRATorchaoLinear(RuledLoraLayer, FusedTorchaoLoraLinear):
    """`FusedTorchaoLoraLinear` whose adapters train by ALLoRA's rule."""
