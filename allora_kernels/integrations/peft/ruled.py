"""What every ALLoRA layer of PEFT's does: each adapter has its rule, and none trains without it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...layer import functional
from .calls import DenseBase, Factors, QuantizedBase
from .fused import FusedLoraLayer


class RuledLoraLayer(FusedLoraLayer):
    """`FusedLoraLayer` whose adapters train by ALLoRA's rule, each by its own: `allora_eta` and `allora_norm` by adapter.

    PEFT's own forward pass knows no rule. Where a call is not fused and would train an adapter that has one, it raises
    RuntimeError while training; in eval mode the call is PEFT's, and raises in the backward pass if there is one.
    """

    other_param_names = (*LoraLayer.other_param_names, "allora_eta", "allora_norm")

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self.allora_eta: dict[str, float] = {}
        self.allora_norm: dict[str, str | None] = {}
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        config = kwargs.get("config")
        if hasattr(config, "allora_eta"):
            self.set_rule(adapter_name, config.allora_eta, config.allora_norm)

    def set_rule(self, adapter: str, eta: float, norm: str | None) -> None:
        """Give `adapter` its rule; ValueError or TypeError unless it is one, and KeyError unless the layer has the adapter."""
        functional.check_rule(self.r[adapter], eta, norm)
        self.allora_eta[adapter], self.allora_norm[adapter] = float(eta), norm

    def _rule(self, adapter: str) -> tuple[float, str | None]:
        return self.allora_eta.get(adapter, 2.0), self.allora_norm.get(adapter)

    def _trains(self, adapter: str) -> bool:
        trained = self.lora_A[adapter].weight.requires_grad or self.lora_B[adapter].weight.requires_grad
        return trained and torch.is_grad_enabled()

    def _fused(self, base: DenseBase | QuantizedBase, factors: Factors, x: Tensor) -> Tensor:
        adapter, scaling = factors.adapter, factors.scaling
        eta, norm = self._rule(adapter)
        if not factors.trains():
            # No gradient, no rule: PEFT may scale the adapter as it likes.
            return base.run(x, factors, eta, None)
        problem = self._why_untrained(adapter, scaling)
        if problem is None:
            return base.run(x, factors, eta, norm)
        return self._refused(problem, lambda: base.run(x, factors, eta, None))

    def _why_untrained(self, adapter: str, scaling: float) -> str | None:
        """Why a fused call cannot train `adapter` by a rule; None where it can."""
        if adapter not in self.allora_norm:
            return (
                f"adapter {adapter!r} has no eta and norm, so it cannot be trained here: add it with an ALLoRAConfig, or load "
                "it with load_allora_model (in an ALLoRA model, PEFT's own load_adapter drops them)"
            )
        if self.allora_norm[adapter] is not None and scaling != 1:
            return (
                f"adapter {adapter!r} is scaled by {scaling:g} while it is trained, and ALLoRA has no scaling: where "
                "scale_layer() did that, unscale_layer() first; else (as hotswap_adapter brings another lora_alpha) freeze it"
            )
        return None

    def _refused(self, problem: str, call: Callable[[], Tensor]) -> Tensor:
        """`call()`, which cannot train what it would: an error while training, else in the backward pass."""
        if self.training:
            raise RuntimeError(problem)
        y = call()
        y.register_hook(functools.partial(_refuse, problem))
        return y

    def _by_peft(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters:
            return super()._by_peft(reason, x, *args, **kwargs)
        used = {*self.active_adapters} if kwargs.get("adapter_names") is None else {*kwargs["adapter_names"]}
        ruled = [a for a in sorted(used) if a in self.lora_A and self.allora_norm.get(a, "unknown") is not None]
        lost = [a for a in ruled if self._trains(a)]
        message = (
            f"this call cannot train {', '.join(lost)} by ALLoRA's rule, because it is PEFT's own ({reason}): make one adapter "
            "that has a rule active with set_adapter, or freeze the adapters"
        )
        if not lost:
            return super()._by_peft(reason, x, *args, **kwargs)
        by_peft = super()._by_peft
        return self._refused(message, lambda: by_peft(reason, x, *args, **kwargs))


def _refuse(message: str, _: Tensor) -> None:
    raise RuntimeError(message)
