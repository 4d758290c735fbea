"""What the section "quantized" compares: forward and backward of a bitsandbytes Linear4bit with an adapter.

A step gives y, dX, dA and dB; the frozen one y and dX. PEFT's runs plain LoRA (C = 1), which is less work than ALLoRA. Each is
checked in fp64 first, with the weight that the layer's 4 bits stand for.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import WrappedALLoRALinear, reference
from allora_kernels.layer.added import add_adapter
from allora_kernels.testing import Inputs

from .grouped import Judge, Spec
from .providers import ETA
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


def _frozen(batch: Batch) -> Step:
    x = batch.inputs.x

    def step():
        y = batch.layer(x)
        y.backward(batch.inputs.g)
        return y.detach(), *taken(x)

    return step


def _factors(batch: Batch) -> tuple[Tensor, Tensor]:
    return tuple(t.detach().clone().requires_grad_() for t in (batch.inputs.lora_A, batch.inputs.lora_B))


def _ours(batch: Batch) -> Step:
    x, a, b = batch.inputs.x, batch.inputs.lora_A, batch.inputs.lora_B
    layer = WrappedALLoRALinear(batch.layer, a.shape[0], ETA, adapter_dtype=a.dtype)
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)

    def step():
        y = layer(x)
        y.backward(batch.inputs.g)
        return y.detach(), *taken(x, layer.lora_A, layer.lora_B)

    return step


def _added(batch: Batch) -> Step:
    x, (lora_A, lora_B) = batch.inputs.x, _factors(batch)

    def step():
        y = add_adapter(batch.layer, x, lora_A, lora_B, ETA, "row", own=True)
        y.backward(batch.inputs.g)
        return y.detach(), *taken(x, lora_A, lora_B)

    return step


def _peft(batch: Batch) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    x, a, b = batch.inputs.x, batch.inputs.lora_A, batch.inputs.lora_B
    model = nn.ModuleDict({"linear": batch.layer})
    model.is_loaded_in_4bit = True
    r = a.shape[0]
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=["linear"])
    layer = inject_adapter_in_model(config, model)["linear"]
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    lora_A.weight, lora_B.weight = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def step():
        y = layer(x)
        y.backward(batch.inputs.g)
        return y.detach(), *taken(x, lora_A.weight, lora_B.weight)

    return step


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
    wide = inputs.to(torch.float64)
    return Judge(["y", "dx", "dA", "dB"], lambda formula: tuple(_by_formula(i, formula) for i in (inputs, wide)))


def _by_formula(inputs: Inputs, formula: str) -> tuple[Tensor, ...]:
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    if formula == "frozen":
        y = F.linear(x, inputs.weight, inputs.bias)
        return y, *torch.autograd.grad(y, x, inputs.g)
    norm = "row" if formula == "allora" else None
    y = reference.allora_linear(x, inputs.weight, inputs.bias, lora_A, lora_B, eta=ETA, norm=norm)
    return y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.g)
