"""Several adapters in one batch on a quantized base: what each adapter would get alone, where the weight can be dequantized."""

import pytest
import torch
from quantized import K, quantized
from torch import nn

from allora_kernels import adapter_rows, add_adapter, apply_allora, disable_adapters, per_sample, set_adapter

NAMES = ["b", None, "default", "b", "default"]
TOKENS = 3
FLOAT, HALF = torch.float32, torch.bfloat16
kinds = pytest.mark.parametrize("kind", ["4bit nf4", "4bit stored as bf16", "float8", "int4"])


def several(kind, dtype=FLOAT):
    model = nn.Sequential(quantized(kind, K, K, dtype), nn.Tanh(), quantized(kind, K, K, dtype))
    apply_allora(model, r=3)
    add_adapter(model, "b", r=5, eta=1.0, norm="token")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def of(model, adapter):
    return [getattr(model[i].adapter(adapter), factor) for i in (0, 2) for factor in ("lora_A", "lora_B")]


def alone(model, x):
    """(y, dX, gradients by adapter) with each adapter's samples on their own."""
    y, dx, grads = torch.empty(x.shape), torch.empty_like(x), {}
    for name in dict.fromkeys(NAMES):
        rows = [i for i, n in enumerate(NAMES) if n == name]
        part = x[rows].detach().requires_grad_()
        if name is None:
            with disable_adapters(model):
                out = model(part)
            dx[rows], y[rows] = torch.autograd.grad(out.float().square().sum(), part)[0], out.float()
            continue
        set_adapter(model, name)
        out = model(part)
        dx[rows], *grads[name] = torch.autograd.grad(out.float().square().sum(), [part, *of(model, name)])
        y[rows] = out.float()
    return y.detach(), dx, grads


def mixed(model, x):
    x = x.detach().requires_grad_()
    with adapter_rows(model, NAMES):
        y = model(x)
    leaves = [*of(model, "default"), *of(model, "b")]
    dx, *grads = torch.autograd.grad(y.float().square().sum(), [x, *leaves])
    return y.detach(), dx, {"default": grads[:4], "b": grads[4:]}


@kinds
def test_each_sample_gets_what_it_would_get_alone(kind, backend):
    model, x = several(kind), torch.randn(len(NAMES), TOKENS, K)
    expected = alone(model, x)
    torch.testing.assert_close(mixed(model, x), expected, rtol=1e-4, atol=1e-4)


def test_autocast_over_the_norms_float32(backend):
    """As bitsandbytes' layer, the batch's y has x's dtype."""
    model, x = several("4bit in bf16", HALF), torch.randn(len(NAMES), TOKENS, K)
    with torch.autocast("cpu", HALF):
        expected, found = alone(model, x), mixed(model, x)
    assert found[0].dtype == found[1].dtype == FLOAT
    for ours, right in zip(found[:2], expected[:2]):
        assert (ours - right).norm() < 0.02 * right.norm()
    for name, grads in expected[2].items():
        for ours, right in zip(found[2][name], grads):
            assert ours.dtype == FLOAT and (ours - right).norm() < 0.05 * right.norm()


def test_nothing_dense_is_kept_for_the_backward_pass(backend):
    model, x = several("4bit nf4"), torch.randn(len(NAMES), TOKENS, K, requires_grad=True)
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with keep, adapter_rows(model, NAMES):
        y = model(x)
    assert kept and (K, K) not in kept
    y.sum().backward()


def test_samples_of_no_adapter_alone_have_the_frozen_bits():
    model, x = several("4bit nf4"), torch.randn(2, TOKENS, K)
    with disable_adapters(model):
        frozen = model(x)
    with adapter_rows(model, [None, None]):
        assert torch.equal(model(x), frozen)


def test_per_sample_gradients(backend):
    model, x = several("4bit nf4"), torch.randn(len(NAMES), TOKENS, K)
    _, _, expected = mixed(model, x)
    with per_sample.record(model), adapter_rows(model, NAMES):
        model(x).square().sum().backward()
    for name, grads in expected.items():
        for p, grad in zip(of(model, name), grads):
            assert p.grad_sample.shape == (NAMES.count(name), *p.shape)
            torch.testing.assert_close(p.grad_sample.sum(0), grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["8bit", "int8"])
def test_a_weight_that_is_not_dequantized_is_refused(kind):
    model = several(kind)
    with pytest.raises(ValueError, match=r"0 is on .*, which takes one adapter a batch"), adapter_rows(model, NAMES):
        pass


def test_a_layer_with_hooks_is_refused():
    model = several("4bit nf4")
    model[2].base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"2 is on .*, which takes one adapter a batch"), adapter_rows(model, NAMES):
        pass


@pytest.mark.parametrize(
    "kind, cast_to, why",
    [
        ("4bit in bf16", None, "it computes in torch.bfloat16 and x is torch.float32: .*bnb_4bit_compute_dtype"),
        ("4bit stored as bf16", HALF, "it computes in torch.float32 and autocast in torch.bfloat16"),
        ("float8", HALF, "it computes in torch.float32 and autocast in torch.bfloat16"),
    ],
)
def test_another_dtype_than_the_layer_computes_in_is_an_error(kind, cast_to, why):
    model = several(kind)
    autocast = torch.autocast("cpu", cast_to, enabled=cast_to is not None)
    with adapter_rows(model, NAMES), autocast, pytest.raises(ValueError, match=why):
        model(torch.randn(len(NAMES), TOKENS, K))


def test_a_hook_that_comes_inside_the_block_is_an_error_and_not_passed_by():
    model = several("4bit nf4")
    with adapter_rows(model, NAMES):
        model[2].base_layer.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="Linear4bit has hooks"):
            model(torch.randn(len(NAMES), TOKENS, K))


@pytest.mark.parametrize("inside", [True, False])
def test_a_weight_that_was_cast_is_named(inside):
    model = several("4bit stored as bf16")
    if not inside:
        model.half()
    with pytest.raises(RuntimeError, match=r"packed weight was cast from .*destroys it"), adapter_rows(model, NAMES):
        model.half()
        model(torch.randn(len(NAMES), TOKENS, K))


def test_a_refused_call_settles_nothing():
    model, x = several("4bit nf4"), torch.randn(len(NAMES), TOKENS, K)
    with adapter_rows(model, NAMES):
        with torch.autocast("cpu", HALF), pytest.raises(ValueError, match=r"autocast in torch.bfloat16"):
            model(x)
        assert model[0].base_layer.compute_dtype is None
        with pytest.raises(ValueError, match="computes garbage"):
            model(x.double())
        assert model(x.to(HALF)).dtype == model[0].base_layer.compute_dtype == HALF


def test_torch_compile_without_a_graph_break(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = several("4bit nf4"), torch.randn(len(NAMES), TOKENS, K)
    expected = mixed(model, x)
    torch._dynamo.reset()
    with adapter_rows(model, NAMES):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
    (dx,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close((y, dx), expected[:2])
