"""What the section "quantized" compares: forward and backward of a bitsandbytes Linear4bit with an adapter.

A step gives y, dX, dA and dB; the frozen one y and dX. PEFT's runs plain LoRA (C = 1), which is less work than ALLoRA. Each is
checked in fp64 first, with the weight that the layer's 4 bits stand for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from allora_kernels import WrappedALLoRALinear
from allora_kernels.layer.added import add_adapter
from allora_kernels.testing import Inputs, with_factors

from .grouped import Judge, Spec
from .providers import ETA, by_formula, peft_layer
from .steps import Step, taken


class Batch(NamedTuple):
    """A layer's inputs, and the layer in 4 bits."""

    inputs: Inputs
    layer: nn.Module


def quantize(inputs: Inputs) -> nn.Module:
    """The frozen layer as a Linear4bit that computes in x's dtype. ImportError without bitsandbytes."""
    from bitsandbytes.nn import Linear4bit

    n, k = inputs.weight.shape
    layer = Linear4bit(k, n, compute_dtype=inputs.x.dtype, quant_type="nf4")
    layer.load_state_dict({"weight": inputs.weight, "bias": inputs.bias})
    return layer.requires_grad_(False).to(inputs.x.device)


def _step(batch: Batch, forward: Callable[[Tensor], Tensor], *parameters: Tensor) -> Step:
    x, g = batch.inputs.x, batch.inputs.g

    def step():
        y = forward(x)
        y.backward(g)
        return y.detach(), *taken(x, *parameters)

    return step


def _frozen(batch: Batch) -> Step:
    return _step(batch, batch.layer)


def _ours(batch: Batch) -> Step:
    a, b = batch.inputs.lora_A, batch.inputs.lora_B
    layer = with_factors(WrappedALLoRALinear(batch.layer, len(a), ETA, adapter_dtype=a.dtype), a, b)
    return _step(batch, layer, layer.lora_A, layer.lora_B)


def _added(batch: Batch) -> Step:
    factors = [t.detach().clone().requires_grad_() for t in (batch.inputs.lora_A, batch.inputs.lora_B)]
    return _step(batch, lambda x: add_adapter(batch.layer, x, *factors, ETA, "row", own=True), *factors)


def _peft(batch: Batch) -> Step:
    layer = peft_layer(batch.layer, batch.inputs)
    return _step(batch, layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)


PROVIDERS = {
    "frozen": Spec("the Linear4bit without an adapter, as bitsandbytes computes it: the floor", _frozen, "frozen"),
    "ours": Spec(
        "`WrappedALLoRALinear`: the weight dequantized once a pass, the kernels multiply",
        _ours,
        "allora",
        tolerance=2.0,
    ),
    "ours-added": Spec(
        "bitsandbytes multiplies, the kernels add the adapter to y and dX in place", _added, "allora", tolerance=4.0
    ),
    "peft": Spec("PEFT's LoRA layer, dropout 0, adapter in the case's dtype", _peft, needs="peft"),
}


def judge_of(batch: Batch) -> Judge:
    """Compares providers with the formulas for the weight that the 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    packed = batch.layer.weight
    weight = dequantize_4bit(packed, packed.quant_state).to(batch.inputs.x.dtype)
    inputs = batch.inputs._replace(weight=weight)
    both = (inputs, inputs.to(torch.float64))
    return Judge(["y", "dx", "dA", "dB"], lambda formula: tuple(by_formula(formula, each, None) for each in both))
