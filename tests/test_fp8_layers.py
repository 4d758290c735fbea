"""Adapters on transformers' FP8Linear. Its product is a kernel from the hub that needs a GPU, so here it is one of dense
weights, with x as it is; the gradient of its input is its own."""

import copy

import pytest
import torch
from quantized import K, N, R, check, plain_results
from torch import nn

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
if not hasattr(fp8, "FP8LinearFunction"):
    pytest.skip("the FP8Linear of this transformers has no backward pass", allow_module_level=True)

from allora_kernels import (  # noqa: E402
    FusedALLoRALinear,
    WrappedALLoRALinear,
    adapter_rows,
    add_adapter,
    apply_allora,
    disable_adapters,
    explain,
    merge_adapter,
    reference,
)
from allora_kernels.layer import bases  # noqa: E402

BLOCK = (32, 32)


def product(input, weight, weight_scale_inv, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
    dense = fp8._dequantize_fp8_weight(weight, weight_scale_inv, block_size, input.dtype)
    return nn.functional.linear(input, dense, bias)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(fp8, "fp8_linear", product)


def linear(dtype=torch.float32, block_size=BLOCK):
    torch.manual_seed(1)
    layer = fp8.FP8Linear(K, N, block_size=block_size, has_bias=True)
    with torch.no_grad():
        layer.weight.copy_((16 * torch.randn(N, K)).to(layer.weight.dtype))
        layer.weight_scale_inv.copy_(torch.rand_like(layer.weight_scale_inv) / 16)
        layer.bias.copy_(torch.randn(N))
    layer.bias.data = layer.bias.data.to(dtype)
    return layer


def wrapped(norm="row", dtype=torch.float32):
    layer = WrappedALLoRALinear(linear(dtype), R, 1.5, norm)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("norm", reference.NORMS)
def test_every_rule(backend, norm):
    check(wrapped(norm), norm, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [BLOCK, None])
def test_adapters_are_float32_and_nothing_else_trains(dtype, block_size):
    layer = WrappedALLoRALinear(linear(dtype, block_size), R)
    assert layer.lora_A.dtype == torch.float32
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(7, K, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    y, dx, _, db = plain_results(layer, x, torch.randn(7, N, dtype=dtype))
    assert y.dtype == dx.dtype == dtype and db.dtype == torch.float32


def test_a_model(backend):
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(N, K))
    whole = sum(p.numel() for p in model.parameters())
    report = apply_allora(model, r=4)
    assert report.bases == {"0": "transformers FP8Linear"} and report.total - report.trainable == whole
    assert type(model[2]) is FusedALLoRALinear and model[0].lora_A.dtype == torch.float32
    told = explain(model).layers["0"]
    assert (
        not told.fused and "transformers FP8Linear computes y and dx (it is not known to multiply by a" in told.reason
    )
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(5, K)
    adapted = model(x)
    with disable_adapters(model):
        assert not torch.allclose(model(x), adapted)
    torch.testing.assert_close(copy.deepcopy(model)(x), adapted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="transformers FP8Linear cannot hold W"):
        merge_adapter(model)
    add_adapter(model, "other")
    with pytest.raises(ValueError, match="which takes one adapter a batch"), adapter_rows(model, ["other"]):
        pass


def test_what_has_no_backward_pass_is_left_alone(monkeypatch):
    packed = linear()
    packed.weight = nn.Parameter(torch.zeros(N, K // 2, dtype=torch.int8), requires_grad=False)
    assert "in 4 bits, which has no backward pass" in bases.obstacle_of(packed)
    with pytest.raises(ValueError, match="has no backward pass"):
        WrappedALLoRALinear(packed)
    monkeypatch.delattr(fp8, "FP8LinearFunction")
    report = apply_allora(nn.ModuleDict({"old": linear(), "plain": nn.Linear(4, 4)}))
    assert list(report.adapted) == ["plain"] and "a newer one does" in report.skipped["old"]


def test_a_weight_that_was_dequantized_is_a_layer_with_a_forward_pass_of_its_own():
    dense = linear()
    dense.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    assert bases.kind_of(dense) is None
    report = apply_allora(nn.ModuleDict({"dense": dense, "plain": nn.Linear(4, 4)}))
    assert "a forward pass of its own" in report.skipped["dense"]


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_weight_that_was_cast_is_refused(cast, enabled):
    layer = wrapped()
    layer.enabled = enabled
    model = cast(nn.Sequential(layer))
    with pytest.raises(
        RuntimeError, match=r"FP8Linear whose weight was cast from torch.float8_e4m3fn to torch\..*destroys"
    ):
        model(torch.randn(2, K, dtype=model[0].weight.dtype))


def test_peft_has_no_layer_for_it():
    peft = pytest.importorskip("peft")
    from allora_kernels.integrations.peft import accelerate_lora, get_allora_model

    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    with pytest.raises(ValueError, match="no class for PEFT's layer on transformers FP8Linear; apply_allora"):
        get_allora_model(nn.Sequential(linear()), config)
    model = peft.get_peft_model(nn.Sequential(linear()), config)
    (why,) = accelerate_lora(model).pefts.values()
    assert "the base layer is a FP8Linear" in why
