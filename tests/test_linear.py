"""`FusedALLoRALinear` as a module: a drop-in for nn.Linear."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn

from allora_kernels import FusedALLoRALinear, reference


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = FusedALLoRALinear(7, 5, r=3, eta=1.5, norm="row")
    nn.init.normal_(layer.lora_B)
    return layer


def test_the_parameters_and_what_is_trained():
    layer = FusedALLoRALinear(7, 5, r=3)
    assert {n: (tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters()} == {
        "weight": ((5, 7), False),
        "bias": ((5,), False),
        "lora_A": ((3, 7), True),
        "lora_B": ((5, 3), True),
    }
    assert (layer.in_features, layer.out_features, layer.r, layer.eta, layer.norm) == (7, 5, 3, 2.0, "row")
    assert isinstance(layer, nn.Linear)
    assert FusedALLoRALinear(7, 5, bias=False).bias is None


def test_the_constructor_takes_what_nn_linear_takes():
    ours = inspect.signature(FusedALLoRALinear.__init__).parameters
    assert set(inspect.signature(nn.Linear.__init__).parameters) <= set(ours)
    layer = FusedALLoRALinear(7, 5, dtype=torch.bfloat16, device="meta")
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in layer.parameters())


def test_a_new_layer_computes_its_frozen_one():
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    layer = FusedALLoRALinear.from_linear(linear, r=3)
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(layer(x), linear(x))
    bound = math.sqrt(1 / 7)
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > bound / 4
    assert not layer.lora_B.any()


@pytest.mark.parametrize(
    "dtype, error", [(torch.int8, ValueError), (torch.float8_e4m3fn, ValueError), ("float32", TypeError)]
)
def test_a_dtype_that_adapters_cannot_have_is_named(dtype, error):
    linear = nn.Linear(7, 5)
    with pytest.raises(error, match="adapter_dtype must be"):
        FusedALLoRALinear.from_linear(linear, adapter_dtype=dtype)
    assert linear.weight.requires_grad


def test_from_linear_shares_the_frozen_parameters():
    linear = nn.Linear(7, 5, bias=True).eval()
    layer = FusedALLoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and not layer.bias.requires_grad and not layer.training
    half = FusedALLoRALinear.from_linear(nn.Linear(7, 5).bfloat16(), adapter_dtype=torch.float32)
    assert half.weight.dtype == torch.bfloat16 and half.lora_A.dtype == half.lora_B.dtype == torch.float32


def test_from_linear_takes_a_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = Conv1D(5, 7)
    layer = FusedALLoRALinear.from_linear(conv, r=3)
    assert layer.weight is conv.weight and layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (7, 5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, requires_grad=True)
    torch.testing.assert_close(layer(x), conv(x) + x @ layer.lora_A.T @ layer.lora_B.T)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, (layer.merge().weight.sum(0)).expand(4, 7))


def test_forward_and_gradients_are_the_references(layer):
    x = torch.randn(4, 7, requires_grad=True)
    g = torch.randn(4, 5)
    leaves = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad(layer(x), leaves, g)
    y = reference.allora_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, eta=1.5, norm="row")
    torch.testing.assert_close(ours, torch.autograd.grad(y, leaves, g))


def test_merge_computes_the_same_without_an_adapter(layer):
    weight = layer.weight.clone()
    merged = layer.eval().merge()
    assert type(merged) is nn.Linear and not merged.training
    x = torch.randn(4, 7)
    torch.testing.assert_close(merged(x), layer(x))
    merged.weight.data.zero_()
    merged.bias.data.zero_()
    assert torch.equal(layer.weight, weight) and layer.bias.any()


def test_merge_sums_in_fp32():
    layer = FusedALLoRALinear(64, 64, r=16, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    exact = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merge().weight, exact.float().bfloat16())


def test_repr_and_explain_say_what_runs(layer):
    assert "in_features=7, out_features=5, bias=True, r=3, eta=1.5, norm='row', backend='eager'" in repr(layer)
    explanation = layer.explain(rows=4)
    assert explanation.backend == "eager" and "cpu tensors" in explanation.reason
    assert set(explanation.plan) == {"adapted_linear", "fused_linear", "adapter_grads"}
    assert str(explanation).startswith("backend: eager (cpu tensors")


def test_a_fallback_shows_in_repr(layer, monkeypatch):
    from allora_kernels.layer import backend

    monkeypatch.setattr(backend, "choose", lambda *args: backend.Choice("eager", "no kernels here", True))
    assert "backend='eager' (no kernels here)" in repr(layer)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_are_their_own(layer, copy_of):
    x, g = torch.randn(4, 7), torch.randn(4, 5)
    layer(x).backward(g)
    other = copy_of(layer)
    assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    with torch.no_grad():
        other.lora_B.mul_(3)
    other.zero_grad()
    other(x).backward(g)
    y = reference.allora_linear(x, other.weight, other.bias, other.lora_A, other.lora_B, eta=1.5)
    torch.testing.assert_close(other.lora_B.grad, torch.autograd.grad(y, other.lora_B, g)[0])
    assert not torch.equal(other(x), layer(x))


def test_state_dict_holds_the_parameters_only(layer):
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "lora_A", "lora_B"]
    other = FusedALLoRALinear(7, 5, r=3, eta=1.5)
    other.load_state_dict(state)
    x = torch.randn(4, 7)
    assert torch.equal(other(x), layer(x))
    assert list(layer.buffers()) == []


def test_reset_parameters_is_nn_linears_and_the_adapters(layer):
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before) and not layer.lora_B.any() and layer.lora_A.any()


def test_dtype_and_device_moves(layer):
    layer.to(torch.float64)
    assert layer(torch.randn(4, 7, dtype=torch.float64)).dtype == torch.float64
    assert all(p.is_meta for p in layer.to("meta").parameters())


def test_functional_call_and_torch_func(layer):
    from torch.func import functional_call, grad

    x = torch.randn(4, 7)
    adapter = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    grads = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(adapter)
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads["lora_A"], layer.lora_A.grad)
    torch.testing.assert_close(grads["lora_B"], layer.lora_B.grad)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"r": 0}, ValueError, "r must be between 1 and 256, got 0"),
        ({"r": 257}, ValueError, "r must be between 1 and 256, got 257"),
        ({"r": 2.0}, TypeError, "r must be an int, got float"),
        ({"r": True}, TypeError, "r must be an int, got bool"),
        ({"eta": 0}, ValueError, "eta"),
        ({"norm": "col"}, ValueError, "norm"),
    ],
)
def test_bad_arguments_leave_the_linear_as_it_was(kwargs, error, message):
    with pytest.raises(error, match=message):
        FusedALLoRALinear(7, 5, **kwargs)
    linear = nn.Linear(7, 5)
    with pytest.raises(error, match=message):
        FusedALLoRALinear.from_linear(linear, **kwargs)
    assert linear.weight.requires_grad


def test_bad_layers_are_named():
    with pytest.raises(ValueError, match=r"in_features and out_features must be >= 1, got 0 and 5"):
        FusedALLoRALinear(0, 5)
    with pytest.raises(TypeError, match=r"takes an nn.Linear or transformers' Conv1D, got Embedding"):
        FusedALLoRALinear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="already has an adapter"):
        FusedALLoRALinear.from_linear(FusedALLoRALinear(7, 5))
    quantized = nn.Linear(7, 5)
    quantized.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating-point weight, got torch.int8"):
        FusedALLoRALinear.from_linear(quantized)


def test_meta_and_fake_tensors_have_their_shapes():
    from torch._subclasses import FakeTensorMode

    meta = FusedALLoRALinear(7, 5, r=3, device="meta")
    meta(torch.empty(4, 7, device="meta")).sum().backward()
    with FakeTensorMode():
        fake = FusedALLoRALinear(7, 5, r=3)
        fake(torch.empty(4, 7)).sum().backward()
    for layer in (meta, fake):
        assert layer.lora_A.grad.shape == (3, 7) and layer.lora_B.grad.shape == (5, 3)


def test_inference_mode_and_training_after_it(layer):
    x = torch.randn(4, 7)
    with torch.inference_mode():
        y = layer(x)
    trained = layer(x)
    assert torch.equal(y, trained)
    trained.sum().backward()
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(layer, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    x, g = torch.randn(4, 7, requires_grad=True), torch.randn(4, 5)
    leaves = (x, layer.lora_A, layer.lora_B)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        for t in leaves:
            t.grad = None
        call(x).backward(g)
        grads.append([t.grad for t in leaves])
    for plain, checkpointed in zip(*grads):
        assert torch.equal(plain, checkpointed)


def test_saved_tensors_may_be_offloaded(layer):
    x = torch.randn(4, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_B)
    with torch.autograd.graph.save_on_cpu():
        (offloaded,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_B)
    assert torch.equal(offloaded, expected)


def test_a_compiled_layer_takes_batches_of_any_length(layer):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 7)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("attribute, value", [("norm", "rows"), ("eta", -2.0)])
def test_a_bad_rule_set_later_is_an_error_at_the_next_call(layer, attribute, value):
    setattr(layer, attribute, value)
    with pytest.raises(ValueError, match=attribute):
        layer(torch.randn(4, 7))
