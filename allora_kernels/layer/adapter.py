"""`ALLoRALayer`: what every layer with an ALLoRA adapter has, whoever computes its frozen product."""

import math

import torch
from torch import nn

from . import switching


class ALLoRALayer(nn.Module):
    """A frozen linear layer ``x [..., in_features] -> y [..., out_features]`` with an adapter ``lora_A [r, in_features]``,
    ``lora_B [out_features, r]`` that is trained under the rule `norm` with `eta`.

    `FusedALLoRALinear` holds the frozen weight itself; `WrappedALLoRALinear` leaves it to the layer that it wraps. Both have a
    `weight` and a `bias` (or None) to look at, `merge()` and `explain(rows)`.
    """

    in_features: int
    out_features: int
    r: int
    eta: float
    norm: str | None

    fan_in_fan_out = False
    """True where `weight` is stored [in_features, out_features], as in transformers' Conv1D."""

    grouped = False
    """True where it adapts a mixture's E experts: lora_A [E, r, in_features], lora_B [E, out_features, r]."""

    _enabled = True
    _recording = None
    """The `per_sample.record` this layer is in, if it is in one."""

    def _add_adapter(self, r: int, eta: float, norm: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.r, self.eta, self.norm = r, float(eta), norm
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter as PEFT does: A Kaiming-uniform(a=√5), B zero. The layer then equals its frozen one."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def enabled(self) -> bool:
        """False where the layer computes as its frozen one alone, to the same bits, and its adapter gets no gradient. What
        checkpointing runs again has the state of its first run. TypeError unless set to a bool."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"enabled must be a bool, got {type(on).__name__}")
        switching.note_switch(self, self._enabled, on)
        self._enabled = on
