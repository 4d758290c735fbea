"""What a fused call takes of a LoRA layer, and how it is computed: on a weight the kernels read, and on a quantized base."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...layer import bases, functional, quantized
from ...layer.explanation import Explanation, explain
from ...layer.linear import computes_as_linear

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def _obstacle_of_tensor(t: Tensor) -> str | None:
    if type(t) not in _PLAIN_TENSORS or not t.is_floating_point():
        return f"a {type(t).__name__} of {t.dtype} (quantized or sharded)"
    return None


class Factors(NamedTuple):
    """One adapter of a layer, gathered once: an nn.Module's attributes are slow to come by."""

    adapter: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def obstacle(self) -> str | None:
        """Why the kernels cannot take it; None where they can."""
        if reason := _obstacle_of_tensor(self.lora_A) or _obstacle_of_tensor(self.lora_B):
            return reason
        if self.lora_A.shape[0] > functional.MAX_RANK:
            return f"rank {self.lora_A.shape[0]} is over {functional.MAX_RANK}"
        if not isinstance(self.scaling, (int, float)):
            return "the scaling is a tensor, as for a compiled hotswap"
        return None

    def trains(self) -> bool:
        """Whether the adapter would get a gradient."""
        return (self.lora_A.requires_grad or self.lora_B.requires_grad) and torch.is_grad_enabled()


class DenseBase(NamedTuple):
    """An nn.Linear or Conv1D, of which the kernels take the weight [N, K] and the bias."""

    weight: Tensor
    bias: Tensor | None
    intercepted: bool

    note = ""

    @staticmethod
    def refusal(base: nn.Module) -> str | None:
        """Why `base` is not computed by its weight and bias alone; None where it is."""
        plain = type(base) is Conv1D or (isinstance(base, nn.Linear) and computes_as_linear(base))
        return None if plain else f"the base layer is a {type(base).__name__}"

    @classmethod
    def of(cls, base: nn.Module) -> "DenseBase":
        weight = base.weight
        return cls(weight.mT if type(base) is Conv1D else weight, base.bias, bases.intercepted(base))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def obstacle(self) -> str | None:
        """Why the kernels cannot take it now; None where they can."""
        if self.intercepted:
            return "hooks on a module inside, or a forward pass of its own, which the kernels would pass by"
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return "the base layer is trained"
        return _obstacle_of_tensor(self.weight)

    def run(self, x: Tensor, factors: Factors, eta: float, norm: str | None) -> Tensor:
        _, lora_A, lora_B, scaling = factors
        return functional.apply(x, self.weight, self.bias, lora_A, lora_B, eta, norm, scaling=scaling)

    def explain(self, rows: int, factors: Factors, norm: str | None) -> Explanation:
        (n, k), lora_A = self.weight.shape, factors.lora_A
        return explain(rows, n, k, lora_A.shape[0], norm, self.weight.device, self.dtype, lora_A.dtype)


class QuantizedBase(NamedTuple):
    """A quantized layer: its weight dequantized for the kernels, or its own product, to which they add the adapter."""

    module: nn.Module

    @staticmethod
    def refusal(base: nn.Module) -> str | None:
        """Why an adapter on `base` could not be trained, or not fused; None where it can."""
        if bases.kind_of(base) is None:
            return f"the base layer is a {type(base).__name__}"
        return bases.obstacle_of(base)

    @classmethod
    def of(cls, base: nn.Module) -> "QuantizedBase":
        return cls(base)

    @property
    def note(self) -> str:
        return f", on {bases.kind_of(self.module)}"

    @property
    def dtype(self) -> torch.dtype:
        return bases.compute_dtype(self.module)

    def obstacle(self) -> str | None:
        """None: `refusal` says it all, and the module's hooks and trained bias are its own to serve."""

    def run(self, x: Tensor, factors: Factors, eta: float, norm: str | None) -> Tensor:
        _, lora_A, lora_B, scaling = factors
        # Outside of the graph's nodes, as in `functional.apply`: autograd gives lora_A's gradient its factor.
        lora_A = lora_A if scaling == 1 else lora_A * scaling
        return quantized.linear(self.module, x, lora_A, lora_B, eta, norm)

    def explain(self, rows: int, factors: Factors, norm: str | None) -> Explanation:
        lora_A = factors.lora_A
        return quantized.explain(self.module, rows, lora_A.shape[0], norm, lora_A.device, lora_A.dtype)
