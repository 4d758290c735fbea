"""What every fused LoRA layer does: the kernels where a call is the common one, and PEFT's own forward pass where not."""

from typing import Any

import torch
from torch import Tensor, nn

from ...layer import backend as _backend
from ...layer import bases
from ...layer.explanation import Explanation
from .calls import DenseBase, Factors, QuantizedBase


class FusedLoraLayer:
    """Goes before a LoRA layer class of PEFT's, whose parameters, merging and dispatch stay as they are.

    A call with one active adapter is one fused call on PEFT's own parameters: x is not cast to the adapter's dtype, and nothing
    of y's size is made but y. Any other call (adapters disabled, merged or several, `adapter_names`, dropout, a variant, hooks
    on the modules inside, sharded weights) is PEFT's; `explain` and `repr` say which.
    """

    base_kind: type[DenseBase] | type[QuantizedBase]
    """How a fused call takes the base layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, factors, reason = self._next_call()
        if args or kwargs:
            reason = f"the call has {', '.join(kwargs) or 'more arguments'}"
        if reason is not None:
            return self._by_peft(reason, x, *args, **kwargs)
        return self._fused(base, factors, x)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        bases.keep_damage(self.base_layer)
        return self

    def explain(self, rows: int = 2048) -> Explanation:
        """What the next call on `rows` rows takes and why; backend ``"peft"`` where it is PEFT's own."""
        base, factors, reason = self._next_call()
        if reason is not None:
            return Explanation("peft", reason, True, {})
        return base.explain(rows, factors, self._rule(factors.adapter)[1])

    def extra_repr(self) -> str:
        base, factors, reason = self._next_call()
        if reason is not None:
            return f"PEFT's own forward pass: {reason}"
        lora_A = factors.lora_A
        choice = _backend.choose(lora_A.device, torch.promote_types(base.dtype, lora_A.dtype))
        return f"{self._in_words(factors)}{base.note}, backend={choice.in_words}"

    def _in_words(self, factors: Factors) -> str:
        eta, norm = self._rule(factors.adapter)
        return f"scaling={factors.scaling:g}" if norm is None else f"eta={eta}, norm={norm!r}"

    def _rule(self, adapter: str) -> tuple[float, str | None]:
        """``(eta, norm)`` of an adapter."""
        return 2.0, None

    def _fused(self, base: DenseBase | QuantizedBase, factors: Factors, x: Tensor) -> Tensor:
        return base.run(x, factors, *self._rule(factors.adapter))

    def _by_peft(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)

    def _next_call(self) -> tuple[DenseBase | QuantizedBase | None, Factors | None, str | None]:
        """``(base, factors, None)`` of a fused call, or ``(None, None, why it is not fused)``."""
        if self._disable_adapters:
            return None, None, "adapters are disabled"
        if self.merged_adapters:
            return None, None, f"{', '.join(self.merged_adapters)} merged into the weight"
        factors_a = self.lora_A
        active = [name for name in self.active_adapters if name in factors_a]
        if len(active) != 1:
            return None, None, f"{len(active)} active adapters{': ' if active else ''}{', '.join(active)}"
        (adapter,) = active
        module, lora_A, lora_B = self.base_layer, factors_a[adapter], self.lora_B[adapter]
        if reason := self._obstacle(adapter, module, lora_A, lora_B):
            return None, None, reason
        base = self.base_kind.of(module)
        factors = Factors(adapter, lora_A.weight, lora_B.weight, self.scaling[adapter])
        if reason := base.obstacle() or factors.obstacle():
            return None, None, reason
        return base, factors, None

    def _obstacle(self, adapter: str, base: nn.Module, lora_A: nn.Module, lora_B: nn.Module) -> str | None:
        """Why the modules inside do not make a fused call; None where they do."""
        dropout = self.lora_dropout[adapter]
        if adapter in self.lora_variant:
            return f"a LoRA variant, {type(self.lora_variant[adapter]).__name__}"
        if type(dropout) is not nn.Identity and dropout.training:
            return f"{dropout} while training"
        if reason := self.base_kind.refusal(base):
            return reason
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return f"lora_A is a {type(lora_A).__name__} and lora_B a {type(lora_B).__name__}, not an nn.Linear each"
        if lora_B.bias is not None:
            return "lora_B has a bias"
        if any(map(bases.intercepted, (lora_A, lora_B, dropout))):
            return "hooks on a module inside, or a forward pass of its own, which the kernels would pass by"
        return None if self.cast_input_dtype_enabled else "PEFT's casting of inputs is disabled"
