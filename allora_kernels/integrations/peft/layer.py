"""PEFT's LoRA layer, by the fused kernels where a call is the common one and by PEFT's own forward pass where not."""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...layer import backend as _backend
from ...layer import functional
from ...layer.explanation import Explanation, explain
from ...models.selection import obstacle

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_plain_linear(base: nn.Module) -> bool:
    """Whether `base` computes what its weight and bias alone say."""
    return type(base) is Conv1D or (isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward)


def _intercepted(module: nn.Module) -> bool:
    """Whether something waits for this module's calls, which the kernels do not make."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class _Call(NamedTuple):
    """What a fused call takes of a layer, gathered once: an nn.Module's attributes are slow to come by."""

    adapter: str
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    transposed: bool

    def obstacle(self) -> str | None:
        """Why the kernels cannot take it; None where they can."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return "the base layer is trained"
        for t in (self.weight, self.lora_A, self.lora_B):
            if type(t) not in _PLAIN_TENSORS or not t.is_floating_point():
                return f"a {type(t).__name__} of {t.dtype} (quantized or sharded)"
        if self.lora_A.shape[0] > functional.MAX_RANK:
            return f"rank {self.lora_A.shape[0]} is over {functional.MAX_RANK}"
        if not isinstance(self.scaling, (int, float)):
            return "the scaling is a tensor, as for a compiled hotswap"
        return None

    def trains(self) -> bool:
        """Whether the adapter would get a gradient."""
        return (self.lora_A.requires_grad or self.lora_B.requires_grad) and torch.is_grad_enabled()

    def run(self, x: Tensor, eta: float, norm: str | None) -> Tensor:
        weight = self.weight.mT if self.transposed else self.weight
        return functional.apply(x, weight, self.bias, self.lora_A, self.lora_B, eta, norm, scaling=self.scaling)


class FusedLoraLinear(Linear):
    """`peft.tuners.lora.layer.Linear` around an nn.Linear or Conv1D, fused: plain LoRA with any scaling.

    A call with one active adapter runs as one `allora_linear` on PEFT's own parameters: x is not cast to the adapter's dtype,
    and nothing of y's size is made but y. Any other call (adapters disabled, merged or several, `adapter_names`, dropout, a
    variant, hooks on the layers inside, sharded or quantized weights) is PEFT's; `explain` and `repr` say which.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call, reason = self._next_call()
        if args or kwargs:
            reason = f"the call has {', '.join(kwargs) or 'more arguments'}"
        if reason is not None:
            return self._by_peft(reason, x, *args, **kwargs)
        return self._fused(call, x)

    def explain(self, rows: int = 2048) -> Explanation:
        """What the next call on `rows` rows takes and why; backend ``"peft"`` where it is not fused."""
        call, reason = self._next_call()
        if reason is not None:
            return Explanation("peft", reason, True, {})
        _, norm = self._rule(call.adapter)
        sizes = (rows, self.out_features, self.in_features, call.lora_A.shape[0])
        return explain(*sizes, norm, call.weight.device, call.weight.dtype, call.lora_A.dtype)

    def extra_repr(self) -> str:
        call, reason = self._next_call()
        if reason is not None:
            return f"not fused: {reason}"
        eta, norm = self._rule(call.adapter)
        choice = _backend.choose(call.weight.device, torch.promote_types(call.weight.dtype, call.lora_A.dtype))
        note = f" ({choice.reason})" if choice.fallback else ""
        rule = f"scaling={call.scaling:g}" if norm is None else f"eta={eta}, norm={norm!r}"
        return f"fused: {rule}, backend={choice.name!r}{note}"

    def _rule(self, adapter: str) -> tuple[float, str | None]:
        """``(eta, norm)`` of an adapter."""
        return 2.0, None

    def _fused(self, call: _Call, x: Tensor) -> Tensor:
        return call.run(x, *self._rule(call.adapter))

    def _by_peft(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)

    def _next_call(self) -> tuple[_Call | None, str | None]:
        """``(what a fused call takes, None)``, or ``(None, why it is not fused)``."""
        if self._disable_adapters:
            return None, "adapters are disabled"
        if self.merged_adapters:
            return None, f"{', '.join(self.merged_adapters)} merged into the weight"
        factors_a = self.lora_A
        active = [name for name in self.active_adapters if name in factors_a]
        if len(active) != 1:
            return None, f"{len(active)} active adapters{': ' if active else ''}{', '.join(active)}"
        (adapter,) = active
        base, lora_A, lora_B = self.base_layer, factors_a[adapter], self.lora_B[adapter]
        dropout, scaling = self.lora_dropout[adapter], self.scaling[adapter]
        if adapter in self.lora_variant:
            return None, f"a LoRA variant, {type(self.lora_variant[adapter]).__name__}"
        if type(dropout) is not nn.Identity and dropout.training:
            return None, f"{dropout} while training"
        if not is_plain_linear(base):
            return None, f"the base layer is a {type(base).__name__}"
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return (
                None,
                f"lora_A is a {type(lora_A).__name__} and lora_B a {type(lora_B).__name__}, not an nn.Linear each",
            )
        if lora_B.bias is not None:
            return None, "lora_B has a bias"
        if _intercepted(base) or _intercepted(lora_A) or _intercepted(lora_B) or _intercepted(dropout):
            return None, "hooks on a module inside, or a forward pass of its own, which the kernels would pass by"
        call = _Call(adapter, base.weight, base.bias, lora_A.weight, lora_B.weight, scaling, type(base) is Conv1D)
        reason = call.obstacle() if self.cast_input_dtype_enabled else "PEFT's casting of inputs is disabled"
        return (call, None) if reason is None else (None, reason)


class ALLoRALinear(FusedLoraLinear):
    """`FusedLoraLinear` whose adapters train by ALLoRA's rule, each by its own: `allora_eta` and `allora_norm` by adapter.

    PEFT's own forward pass knows no rule. Where a call is not fused and would train an adapter that has one, it raises
    RuntimeError while training; in eval mode the call is PEFT's, and raises in the backward pass if there is one.
    """

    other_param_names = (*FusedLoraLinear.other_param_names, "allora_eta", "allora_norm")

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

    def _fused(self, call: _Call, x: Tensor) -> Tensor:
        adapter, scaling = call.adapter, call.scaling
        eta, norm = self._rule(adapter)
        if not call.trains():
            # No gradient, no rule: PEFT may scale the adapter as it likes.
            return call.run(x, eta, None)
        if adapter not in self.allora_norm:
            raise RuntimeError(
                f"adapter {adapter!r} has no eta and norm, so it cannot be trained here: add it with an ALLoRAConfig, or load "
                "it with load_allora_model (in an ALLoRA model, PEFT's own load_adapter drops them)"
            )
        if norm is not None and scaling != 1:
            raise RuntimeError(
                f"adapter {adapter!r} is scaled by {scaling:g} while it is trained, and ALLoRA has no scaling: "
                "unscale_layer() first, or freeze it"
            )
        return call.run(x, eta, norm)

    def _by_peft(self, reason: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters:
            return super()._by_peft(reason, x, *args, **kwargs)
        used = {*self.active_adapters} if kwargs.get("adapter_names") is None else {*kwargs["adapter_names"]}
        ruled = [a for a in sorted(used) if a in self.lora_A and self.allora_norm.get(a, "unknown") is not None]
        lost = [a for a in ruled if self._trains(a)]
        message = (
            f"this call cannot train {', '.join(lost)} by ALLoRA's rule, because it is not fused ({reason}): make one adapter "
            "that has a rule active with set_adapter, or freeze the adapters"
        )
        if lost and self.training:
            raise RuntimeError(message)
        y = super()._by_peft(reason, x, *args, **kwargs)
        return _RefuseBackward.apply(y, message) if lost else y


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, message: str) -> Tensor:
        ctx.message = message
        return y.view_as(y)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ctx.message)


def make_layer(declared: Any, target: nn.Module, adapter_name: str, **kwargs: Any) -> ALLoRALinear:
    """The layer that PEFT puts in `target`'s place, for the ALLoRAConfig `declared`.

    Raises:
        ValueError: an adapter here would not train by the rule, or not at all: the target is no plain linear layer, or is
            adapted already; or the config was changed into one that ALLoRA has no meaning for.
    """
    config = kwargs.get("config", declared)
    config.check()
    name = kwargs.get("target_name", "")
    called = f"the target {name!r}" if name else f"a target, {target},"
    if isinstance(target, BaseTunerLayer):
        raise ValueError(f"{called} has adapters of another kind: merge_and_unload() them first")
    reason = obstacle(target, {target: []}) if kwargs.get("parameter_name") is None else "a parameter and not a layer"
    if reason is not None:
        raise ValueError(
            f"{called} cannot be ALLoRA ({reason}), and PEFT would train it as plain LoRA: leave it out, with "
            "exclude_modules=[...] or narrower target_modules"
        )
    conv = isinstance(target, Conv1D)
    if "config" in kwargs:
        config.fan_in_fan_out = conv
    else:
        kwargs["fan_in_fan_out"] = conv
    layer = ALLoRALinear(target, adapter_name, is_target_conv_1d_layer=conv, **kwargs)
    layer.set_rule(adapter_name, config.allora_eta, config.allora_norm)
    return layer
