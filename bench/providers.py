"""What is compared: one linear layer with an adapter, as each library would run it. Named by what they do."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import FusedALLoRALinear, reference
from allora_kernels.testing import Inputs, assert_close


class Provider(NamedTuple):
    """`forward(x)` is the adapted layer; `adapter` holds (lora_A, lora_B), or nothing for the frozen floor; `norm` is the
    rule whose gradients it should have."""

    forward: Callable[[Tensor], Tensor]
    adapter: tuple[Tensor, ...]
    norm: str | None


def frozen(inputs: Inputs) -> Provider:
    """The frozen layer alone, by the vendor's GEMM: the floor."""
    return Provider(lambda x: F.linear(x, inputs.weight, inputs.bias), (), None)


def _frozen_linear(inputs: Inputs) -> nn.Linear:
    n, k = inputs.weight.shape
    linear = nn.Linear(k, n, bias=inputs.bias is not None, device="meta")
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    if inputs.bias is not None:
        linear.bias = nn.Parameter(inputs.bias, requires_grad=False)
    return linear


def ours(inputs: Inputs) -> Provider:
    """`FusedALLoRALinear`, rule "row"."""
    layer = FusedALLoRALinear.from_linear(
        _frozen_linear(inputs), r=inputs.lora_A.shape[0], adapter_dtype=inputs.lora_A.dtype
    )
    with torch.no_grad():
        layer.lora_A.copy_(inputs.lora_A)
        layer.lora_B.copy_(inputs.lora_B)
    return Provider(layer, (layer.lora_A, layer.lora_B), "row")


class _EagerALLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B):
        s = x.to(lora_A.dtype) @ lora_A.T
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        return F.linear(x, weight, bias) + (s @ lora_B.T).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        c = ((lora_B.float() @ lora_A.float()).norm(dim=1) + 0.25).rsqrt()
        wide = g.to(lora_A.dtype)
        scaled = (c * wide).to(wide.dtype)
        dx = g @ weight + (wide @ lora_B @ lora_A).to(x.dtype)
        return dx, None, None, (scaled @ lora_B).T @ x.to(wide.dtype), scaled.T @ s


def eager(inputs: Inputs) -> Provider:
    """ALLoRA written directly: the formulas of rule "row" in an autograd function, with BA materialised for its norms."""
    lora_A, lora_B = (t.clone().requires_grad_() for t in (inputs.lora_A, inputs.lora_B))
    return Provider(
        lambda x: _EagerALLoRA.apply(x, inputs.weight, inputs.bias, lora_A, lora_B), (lora_A, lora_B), "row"
    )


def peft(inputs: Inputs) -> Provider:
    """PEFT's own LoRA layer (dropout 0, scaling 1)."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    r = inputs.lora_A.shape[0]
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0)
    layer = Linear(_frozen_linear(inputs), "default", config=config, r=r, lora_alpha=r, lora_dropout=0.0)
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    lora_A.weight = nn.Parameter(inputs.lora_A.clone())
    lora_B.weight = nn.Parameter(inputs.lora_B.clone())
    return Provider(layer, (lora_A.weight, lora_B.weight), None)


PROVIDERS = {"frozen": frozen, "ours": ours, "eager": eager, "peft": peft}


def forward_backward(provider: Provider, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """(y, dx, dA, dB) of one forward and backward pass; of the frozen layer (y, dx)."""
    y = provider.forward(x)
    return y, *torch.autograd.grad(y, (x, *provider.adapter), g)


def check(provider: Provider, inputs: Inputs) -> None:
    """Raise AssertionError unless the provider's results match the fp64 reference."""
    x = inputs.x.clone().requires_grad_()
    results = forward_backward(provider, x, inputs.g)

    def by_reference(inputs: Inputs) -> tuple[Tensor, ...]:
        x, lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
        if not provider.adapter:
            y = F.linear(x, inputs.weight, inputs.bias)
            return y, *torch.autograd.grad(y, x, inputs.g)
        y = reference.allora_linear(x, inputs.weight, inputs.bias, lora_A, lora_B, norm=provider.norm)
        return y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.g)

    for name, *values in zip(
        ("y", "dx", "da", "db"), results, by_reference(inputs), by_reference(inputs.to(torch.float64))
    ):
        assert_close(*values, name)
