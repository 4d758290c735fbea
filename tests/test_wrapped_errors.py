"""What `WrappedALLoRALinear` refuses, and what it says of itself."""

import foreign_layers as foreign
import pytest
import torch
from foreign_layers import K, wrapped
from torch import nn

from allora_kernels import FusedALLoRALinear, WrappedALLoRALinear, use_batch_invariant


def test_a_layer_without_a_backward_pass_is_an_error():
    layer, inputs = wrapped(foreign.GivesNoGradient)
    torch.testing.assert_close(
        layer(inputs.x), inputs.x @ (inputs.weight + inputs.lora_B @ inputs.lora_A).T + inputs.bias
    )
    with pytest.raises(RuntimeError, match="GivesNoGradient gave an output that does not require grad"):
        layer(inputs.x.requires_grad_())


def test_a_backward_pass_that_gives_nothing_is_an_error():
    layer, inputs = wrapped(foreign.ForgetsItsGradient)
    with pytest.raises(RuntimeError, match="gave no gradient of its input"):
        layer(inputs.x.requires_grad_()).sum().backward()


def test_batch_invariance_is_refused():
    layer, inputs = wrapped()
    with use_batch_invariant(), pytest.raises(RuntimeError, match="Foreign computes its own product"):
        layer(inputs.x)


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda x: None, "must return a floating-point Tensor, got NoneType"),
        (lambda x: x.int(), "must return a floating-point Tensor, got torch.int32"),
        (lambda x: x, r"must return \[24, 13\] on cpu, got \[24, 11\] on cpu"),
    ],
)
def test_a_layer_that_returns_something_else(returned, message):
    layer, inputs = wrapped()
    layer.base_layer.forward = returned
    with pytest.raises((TypeError, ValueError), match=message):
        layer(inputs.x)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(2, K, dtype=torch.int64), "floating-point Tensor, got torch.int64"),
        ([1.0], "floating-point Tensor, got list"),
        (torch.ones(2, K + 1), r"\[..., K\] with K = 11"),
        (torch.ones(2, K, device="meta"), "lora_A is on cpu but x is on meta"),
    ],
)
def test_bad_inputs(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrapped()[0](x)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda base: WrappedALLoRALinear("linear"), TypeError, "must be an nn.Module, got str"),
        (lambda base: WrappedALLoRALinear(nn.ReLU()), TypeError, "ReLU must have an int in_features, got None"),
        (
            lambda base: WrappedALLoRALinear(nn.utils.skip_init(nn.Linear, 0, 3)),
            ValueError,
            "in_features must be >= 1, got 0",
        ),
        (lambda base: WrappedALLoRALinear(FusedALLoRALinear(4, 3)), TypeError, "has an ALLoRA adapter already"),
        (lambda base: WrappedALLoRALinear(base, r=0), ValueError, "r must be between 1 and 256"),
        (lambda base: WrappedALLoRALinear(base, norm="rows"), ValueError, "norm must be one of"),
        (lambda base: WrappedALLoRALinear(base, eta=0.0), ValueError, "eta must be finite and > 0"),
        (
            lambda base: WrappedALLoRALinear(base, adapter_dtype=torch.int8),
            ValueError,
            "adapter_dtype must be .*got torch.int8",
        ),
        (
            lambda base: WrappedALLoRALinear(base, adapter_dtype=torch.float8_e4m3fn),
            ValueError,
            "adapter_dtype must be .*got torch.float8_e4m3fn",
        ),
        (
            lambda base: WrappedALLoRALinear(base, adapter_dtype="float32"),
            TypeError,
            "adapter_dtype must be a torch.dtype or None, got 'float32'",
        ),
    ],
)
def test_bad_arguments_leave_the_layer_alone(make, error, message):
    base = nn.Linear(4, 3)
    with pytest.raises(error, match=message):
        make(base)
    assert base.weight.requires_grad


def test_the_parameters_and_what_it_says():
    linear = nn.Linear(7, 5).eval().bfloat16()
    layer = WrappedALLoRALinear(linear, 3)
    assert [(n, p.requires_grad) for n, p in layer.named_parameters()] == [
        ("lora_A", True),
        ("lora_B", True),
        ("base_layer.weight", False),
        ("base_layer.bias", False),
    ]
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.lora_A.dtype == torch.bfloat16 and tuple(layer.lora_A.shape) == (3, 7) and not layer.lora_B.any()
    assert WrappedALLoRALinear(linear, 3, adapter_dtype=torch.float32).lora_B.dtype == torch.float32
    assert "on Linear, adapter backend='eager'" in repr(layer)
    why = "it is not known to multiply by a dequantized weight"
    assert layer.explain().plan["y and dx"] == f"Linear, its own product ({why})"
    with pytest.raises(ValueError, match="the adapter is beside a Linear, into which it is not merged"):
        layer.merge()
