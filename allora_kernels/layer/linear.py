"""`FusedALLoRALinear`: the layer, as a drop-in for `torch.nn.Linear`."""

import torch
from torch import Tensor, nn

from . import backend as _backend
from . import bases, batch_invariance, functional
from .adapter import AdaptedLinear, check_adapter_dtype
from .explanation import Explanation, explain, explain_disabled
from .sharding import is_sharded, local_shape
from .zero import is_cut_up, whole_shape


class FusedALLoRALinear(AdaptedLinear, nn.Linear):
    """A frozen linear layer with a trainable ALLoRA adapter: ``y = x Wᵀ + bias + (x Aᵀ) Bᵀ``.

    No dropout and no alpha/r; instead the adapter's gradients are scaled by the inverse norm that `norm` names
    (arXiv 2410.09692, see `allora_kernels.allora_linear`). `weight` and `bias` are frozen; `lora_A [r, in_features]`
    (Kaiming-uniform, a=√5) and `lora_B [out_features, r]` (zero) are trained, so a new layer computes exactly its
    frozen one.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        r: rank of the adapter, 1 to 256.
        eta: η > 0, the coefficient where the adapter is zero.
        norm: ``"row"``, ``"matrix"``, ``"factor"``, ``"entry"``, ``"token"`` or None (plain LoRA).
        bias: whether the frozen layer has a bias.
        device: as in `torch.nn.Linear`.
        dtype: as in `torch.nn.Linear`.

    Raises:
        ValueError: r, eta, norm or a feature count out of range.
        TypeError: r is no int or eta no number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        *,
        eta: float = 2.0,
        norm: str | None = "row",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        functional.check_rule(r, eta, norm)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be >= 1, got {in_features} and {out_features}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._freeze()
        self._add_adapter(r, eta, norm, self.weight.device, self.weight.dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        eta: float = 2.0,
        norm: str | None = "row",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> "FusedALLoRALinear":
        """An adapted layer around `linear`'s own weight and bias, which are shared (not copied) and frozen.

        Args:
            linear: an `nn.Linear`, or transformers' Conv1D (weight stored [in_features, out_features]).
            r: rank, as in the constructor.
            eta: η, as there.
            norm: the rule, as there.
            adapter_dtype: dtype of lora_A and lora_B; None for the weight's.

        Raises:
            TypeError: `linear` is neither, is quantized, pruned or parametrized, or is already adapted; adapter_dtype is no
                dtype.
            ValueError: r, eta, norm or adapter_dtype out of range. `linear` is untouched then.
        """
        functional.check_rule(r, eta, norm)
        check_adapter_dtype(adapter_dtype)
        if isinstance(linear, FusedALLoRALinear):
            raise TypeError("from_linear got a FusedALLoRALinear, which already has an adapter; pass its merge()")
        fan_in_fan_out = is_conv1d(linear)
        if not (fan_in_fan_out or isinstance(linear, nn.Linear)):
            raise TypeError(f"from_linear takes an nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
        if (kind := bases.kind_of(linear)) is not None:
            raise TypeError(f"from_linear takes a plain weight, got {kind}: use WrappedALLoRALinear(linear)")
        if not linear.weight.is_floating_point():
            raise TypeError(
                f"from_linear takes a floating-point weight, got {linear.weight.dtype} (a quantized layer keeps its own "
                "forward pass: WrappedALLoRALinear(linear) adds to that)"
            )
        if not isinstance(linear.weight, nn.Parameter):
            raise TypeError(
                "from_linear takes a weight that is a parameter, not one computed from others (pruned or parametrized): call "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations first"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        shape = whole_shape(linear.weight)
        layer.out_features, layer.in_features = reversed(shape) if fan_in_fan_out else shape
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.fan_in_fan_out = fan_in_fan_out
        layer._freeze()
        layer._add_adapter(r, eta, norm, linear.weight.device, adapter_dtype or linear.weight.dtype)
        layer.train(linear.training)
        return layer

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def reset_parameters(self) -> None:
        """As in `nn.Linear`; where there is an adapter, it is initialised too."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_adapter()

    takes_mixed_batches = True

    @property
    def frozen_weight(self) -> Tensor:
        """The frozen weight as ``[out_features, in_features]``, whichever way it is stored."""
        return self.weight.mT if self.fan_in_fan_out else self.weight

    def frozen_product(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The frozen weight and bias."""
        return self.frozen_weight, self.bias

    def frozen_linear(self, input: Tensor) -> Tensor:
        """What the layer computes without an adapter."""
        if batch_invariance.enabled():
            return self._with_zeros(input)
        if not self.fan_in_fan_out:
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _adapted(self, input, lora_A, lora_B, eta, norm, sink=None):
        return functional.apply(input, self.frozen_weight, self.bias, lora_A, lora_B, eta, norm, sink=sink)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain `nn.Linear` with weight ``W + BA`` (a copy, summed in fp32 or better, in the weight's dtype).

        For inference and export. Do not train on it: in bf16 the sum rounds small later updates away.

        Raises:
            ValueError: the layer is disabled, so that the sum would not be what it computes, or cut up by FSDP2, tensor
                parallelism or DeepSpeed's ZeRO-3.
        """
        if not self.enabled:
            raise ValueError("the layer is disabled, so W + BA is not what it computes: enable it before merging")
        if is_cut_up(self.weight) or any(map(is_sharded, self.parameters())):
            by = "DeepSpeed's ZeRO-3" if is_cut_up(self.weight) else "FSDP2 or tensor parallelism"
            raise ValueError(f"the layer is cut up by {by}: save the adapter, and merge it in one process")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.lora_B.to(wide) @ self.lora_A.to(wide)
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        linear.weight = nn.Parameter((self.frozen_weight.to(wide) + product).to(self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    def explain(self, rows: int = 2048, device: torch.device | None = None) -> Explanation:
        """Which backend a call on this layer takes and why, and the plan of each step for an input of `rows` rows, on `device`
        (None: where the layer is). Of a layer that is cut over processes, for the part that is here."""
        if not self.enabled and not batch_invariance.enabled():
            return explain_disabled()
        return explain(
            rows,
            *self._shape_here(),
            self.r,
            self.norm,
            device or self.weight.device,
            self.weight.dtype,
            self.lora_A.dtype,
        )

    def _shape_here(self) -> torch.Size | tuple[int, int]:
        cut_up = is_cut_up(self.weight)
        return (self.out_features, self.in_features) if cut_up else local_shape(self.frozen_weight)

    def extra_repr(self) -> str:
        choice = _backend.choose(self.weight.device, self.weight.dtype)
        return f"{super().extra_repr()}, {self._in_words(f'backend={choice.in_words}')}"


def computes_as_linear(module: nn.Linear) -> bool:
    """Whether `module` runs nn.Linear's forward pass, or one that does the same."""
    cls = type(module)
    # It rounds the product to x's dtype before it adds a bias.
    falcon = cls.__name__ == "FalconLinear" and cls.__module__.startswith("transformers.") and module.bias is None
    return falcon or cls.forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer whose weight is stored [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and len(whole_shape(module.weight)) == 2
