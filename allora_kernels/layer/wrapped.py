"""`WrappedALLoRALinear`: an adapter on a layer of another library, as quantized ones are."""

import torch
from torch import Tensor, nn

from . import backend as _backend
from . import bases, batch_invariance, quantized
from .adapter import AdaptedLinear, ALLoRALayer, check_adapter_dtype
from .dequantizing import PackedWeight
from .explanation import Explanation, explain_disabled
from .functional import check_rule


class WrappedALLoRALinear(AdaptedLinear):
    """A frozen linear layer of another library with a trainable ALLoRA adapter: ``y = base_layer(x) + (x Aᵀ) Bᵀ``.

    `base_layer` computes its output and the gradient of its input in its own way, say from a quantized weight, and this
    library's kernels add the adapter to both in place. `lora_A [r, in_features]` (Kaiming-uniform, a=√5) and
    `lora_B [out_features, r]` (zero) are trained, so a new layer computes exactly what `base_layer` does.

    Where `base_layer` is bitsandbytes' Linear4bit or Linear8bitLt, transformers' FP8Linear, or an nn.Linear with a weight-only
    tensor of torchao, no tensor of y's or x's size is made beside its own. What any other layer returns, or one with hooks, may
    be held elsewhere: it is copied, once forward and once backward. Of those whose weight can be dequantized, the kernels take
    the product over where they can. `explain()` says which it is.

    Args:
        base_layer: any module that maps ``[..., in_features]`` to ``[..., out_features]`` linearly and has these two
            attributes. It becomes a submodule; its parameters are frozen.
        r: rank, as in `FusedALLoRALinear`.
        eta: η, as there.
        norm: the rule, as there.
        adapter_dtype: dtype of lora_A and lora_B; None for the weight's where that has 16 bits or more and holds no packed
            numbers, else float32.

    Raises:
        TypeError: `base_layer` is no module, has an adapter already or has no int in_features and out_features; r is no int,
            eta no number or adapter_dtype no dtype.
        ValueError: r, eta, norm, adapter_dtype or a feature count out of range; a quantized layer that gives its input no
            gradient. `base_layer` is untouched then.
        RuntimeError: from a call, where sharding or casting has left `base_layer` without its quantized weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 16,
        eta: float = 2.0,
        norm: str | None = "row",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_rule(r, eta, norm)
        check_adapter_dtype(adapter_dtype)
        _check_base(base_layer)
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer.requires_grad_(False)
        bases.keep_backward(base_layer)
        bases.watch_casts(base_layer)
        device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), None)
        self._add_adapter(r, eta, norm, device, adapter_dtype or bases.weight_dtype(base_layer))
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """`base_layer`'s weight, as it stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """`base_layer`'s bias, if it has one."""
        return getattr(self.base_layer, "bias", None)

    def _adapted(self, input, lora_A, lora_B, eta, norm, sink=None):
        return quantized.linear(self.base_layer, input, lora_A, lora_B, eta, norm, sink)

    @property
    def takes_mixed_batches(self) -> bool:
        """Whether each row of a call may have an adapter of its own, for which `base_layer`'s weight is dequantized.

        Raises:
            RuntimeError: sharding or casting has destroyed that.
        """
        if reason := bases.damage_of(self.base_layer):
            raise RuntimeError(f"the frozen layer: {reason}")
        return quantized.can_be_taken_over(self.base_layer)

    def frozen_product(self, input: Tensor) -> tuple[PackedWeight, Tensor | None]:
        """The weight and the bias that `base_layer` multiplies by and adds, where it `takes_mixed_batches`."""
        return quantized.frozen_product(self.base_layer, input)

    def frozen_linear(self, input: Tensor) -> Tensor:
        """What the layer computes without an adapter."""
        quantized.check_call(self.base_layer, input)
        if batch_invariance.enabled():
            return self._with_zeros(input)
        return self.base_layer(input)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        bases.keep_damage(self.base_layer)
        return self

    def merge(self) -> nn.Linear:
        """Always raises: a sum rounded to the quantized weight's few bits would lose the adapter.

        Raises:
            ValueError: says what to do instead.
        """
        raise ValueError(self.why_it_cannot_merge)

    @property
    def why_it_cannot_merge(self) -> str:
        """What `merge` says."""
        if bases.kind_of(self.base_layer) is None:
            return (
                f"the adapter is beside a {self.base_kind}, into which it is not merged: save_adapter(model, folder), load the "
                "model anew without quantization (or dequantize it), load_adapter(model, folder) and merge_adapter(model) there"
            )
        return (
            f"{self.base_kind} cannot hold W + BA, which its few bits would round away: save_adapter(model, folder), load the "
            "model without quantization, load_adapter(model, folder) and merge_adapter(model) there"
        )

    def explain(self, rows: int = 2048, device: torch.device | None = None) -> Explanation:
        """Which backend the adapter takes and why, and what runs each step for an input of `rows` rows in the dtype that
        `base_layer` computes in, as far as it says, on `device` (None: where the layer is)."""
        if not self.enabled and not batch_invariance.enabled():
            return explain_disabled(self.base_kind)
        return quantized.explain(
            self.base_layer, rows, self.r, self.norm, device or self.lora_A.device, self.lora_A.dtype
        )

    @property
    def base_kind(self) -> str:
        """What `base_layer` is, in words."""
        return bases.name_of(self.base_layer)

    def extra_repr(self) -> str:
        choice = _backend.choose(self.lora_A.device, self.lora_A.dtype)
        rest = self._in_words(f"on {self.base_kind}", f"adapter backend={choice.in_words}")
        return f"in_features={self.in_features}, out_features={self.out_features}, {rest}"


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Module):
        raise TypeError(f"base_layer must be an nn.Module, got {type(base).__name__}")
    if any(isinstance(module, ALLoRALayer) for module in base.modules()):
        raise TypeError(f"base_layer {type(base).__name__} has an ALLoRA adapter already")
    for name in ("in_features", "out_features"):
        size = getattr(base, name, None)
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"base_layer {type(base).__name__} must have an int {name}, got {size!r}")
        if size < 1:
            raise ValueError(f"base_layer's {name} must be >= 1, got {size}")
    if bases.kind_of(base) is not None and (reason := bases.obstacle_of(base)):
        raise ValueError(f"base_layer: {reason}")
