"""Quantized linear layers as bitsandbytes and torchao make them, on the CPU or a GPU."""

import pytest
import torch
from comparing import assert_all_close
from torch import nn

from allora_kernels import WrappedALLoRALinear, reference

N, K, R = 96, 64, 5


def linear4bit(linear, compute_dtype=None, quant_type="nf4", double=True, storage=torch.uint8):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")
    n, k = linear.weight.shape
    layer = bnb.nn.Linear4bit(k, n, linear.bias is not None, compute_dtype, double, quant_type, storage)
    layer.load_state_dict(linear.state_dict())
    return layer


def linear8bit(linear, threshold=0.0, has_fp16_weights=False):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")
    n, k = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights, threshold)
    layer.load_state_dict(linear.state_dict())
    return layer


def torchao(linear, config, **kwargs):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install '.[quantized]'"
    )
    model = nn.Sequential(linear)
    quantization.quantize_(model, getattr(quantization, config)(**kwargs))
    return model[0]


def in_groups(linear, config, **kwargs):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install '.[quantized]'"
    )
    return torchao(linear, config, granularity=quantization.PerGroup(32), **kwargs)


KINDS = {
    "4bit nf4": linear4bit,
    "4bit fp4": lambda linear: linear4bit(linear, None, "fp4", False),
    "4bit in bf16": lambda linear: linear4bit(linear, torch.bfloat16),
    "4bit stored as bf16": lambda linear: linear4bit(linear, torch.float32, storage=torch.bfloat16),
    "8bit": linear8bit,
    "8bit with outliers": lambda linear: linear8bit(linear, 6.0),
    "8bit of fp16 weights": lambda linear: linear8bit(linear, 0.0, True),
    "int8": lambda linear: torchao(linear, "Int8WeightOnlyConfig"),
    "float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
    "int4": lambda linear: in_groups(linear, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "int8 in groups": lambda linear: in_groups(linear, "Int8WeightOnlyConfig"),
}


def quantized(kind, k, n, dtype=torch.float32, device="cpu"):
    """A layer of one of KINDS with a bias, of random weights: the same at every call."""
    torch.manual_seed(1)
    return KINDS[kind](nn.Linear(k, n, dtype=dtype, device="cpu" if "bit" in kind else device)).to(device)


@torch.no_grad()
def dequantized(layer, dtype=torch.float32):
    """What `layer` multiplies with, [N, K] in fp64: its product with the identity."""
    device = next(layer.parameters()).device
    bias, layer.bias = layer.bias, None
    try:
        return layer(torch.eye(layer.in_features, dtype=dtype, device=device)).double().mT
    finally:
        layer.bias = bias


def wrapped(kind, norm="row", dtype=torch.float32, adapter_dtype=torch.float32, device="cpu"):
    layer = WrappedALLoRALinear(quantized(kind, K, N, dtype, device), R, 1.5, norm, adapter_dtype=adapter_dtype)
    nn.init.normal_(layer.lora_B)
    return layer


def results(f, x, a, b, g):
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = f(*leaves)
    return y, *torch.autograd.grad(y, leaves, g.to(y.dtype))


def plain_results(layer, x, g):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)


def check(layer, norm, dtype, rows=(3, 7)):
    """y and all gradients are at most twice as far from fp64 as those of the layer with an eager adapter."""
    base, a, b = layer.base_layer, layer.lora_A, layer.lora_B
    weight, bias = dequantized(base, dtype), base.bias.double()
    x = torch.randn(*rows, K, device=a.device, dtype=dtype)
    g = torch.randn(*rows, N, device=a.device, dtype=dtype)
    wide = torch.promote_types(dtype, a.dtype)

    def lora(x, a, b):
        return base(x) + (x.to(wide) @ a.to(wide).mT @ b.to(wide).mT).to(dtype)

    def allora(x, a, b):
        return reference.allora_linear(x, weight.to(x.dtype), bias.to(x.dtype), a, b, eta=1.5, norm=norm)

    ours = plain_results(layer, x, g)
    # The coefficient is on the adapter's gradients alone, and these do not depend on the frozen weight.
    eager = *results(lora, x, a, b, g)[:2], *results(allora, x, a, b, g)[2:]
    exact = results(allora, *(t.double() for t in (x, a, b, g)))
    assert_all_close("y dx da db", ours, eager, exact)
