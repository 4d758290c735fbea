"""The cached coefficient is computed once per optimizer step and is never stale."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import FusedALLoRALinear, reference


@pytest.fixture
def calls(monkeypatch):
    calls = []
    original = reference.weight_coefficient
    monkeypatch.setattr(reference, "weight_coefficient", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = FusedALLoRALinear(7, 5, r=3)
    nn.init.normal_(layer.lora_B)
    return layer


X, G = torch.randn(4, 7), torch.randn(4, 5)


def backward(layer):
    layer.zero_grad()
    layer(X).backward(G)


def assert_fresh(layer):
    """The layer's gradients are those of the parameters it has now."""
    backward(layer)
    leaves = (layer.lora_A, layer.lora_B)
    y = reference.allora_linear(X, layer.weight, layer.bias, *leaves, eta=layer.eta, norm=layer.norm)
    for ours, expected in zip((p.grad for p in leaves), torch.autograd.grad(y, leaves, G)):
        torch.testing.assert_close(ours, expected)


def test_computed_once_per_step_under_accumulation(layer, calls):
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B])
    for step in range(3):
        for _ in range(4):
            layer(X).backward(G)
        assert len(calls) == step + 1
        optimizer.step()
        optimizer.zero_grad()


def test_not_computed_without_a_backward_pass(layer, calls):
    with torch.no_grad():
        layer(X)
    layer(X)
    assert calls == []


def test_checkpointing_computes_it_once(layer, calls):
    x = X.clone().requires_grad_()
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).backward(G)
    assert len(calls) == 1


def in_place(layer):
    with torch.no_grad():
        layer.lora_A.mul_(2)


def load(layer):
    layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()})


def assign(layer):
    layer.load_state_dict({name: 2 * t for name, t in layer.state_dict().items()}, assign=True)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)


def swap_parameter(layer):
    layer.lora_B = nn.Parameter(3 * layer.lora_B.detach())


def swap_data(layer):
    layer.lora_B.data = 3 * layer.lora_B.data


def swap_data_twice(layer):
    # The second allocation can land where the first lay, at the same version.
    for factor in (3, 0.5):
        layer.lora_B.data = factor * layer.lora_B.data


def change_eta(layer):
    layer.eta = 0.3


def change_norm(layer):
    layer.norm = "matrix"


def change_dtype(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def vector_to_parameters(layer):
    nn.utils.vector_to_parameters(torch.randn(36), [layer.lora_A, layer.lora_B])


class _DataOptimizer(torch.optim.Optimizer):
    """Writes through .data, as quantized-state optimizers do: no version counter moves."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(2)


def data_optimizer(layer):
    version = layer.lora_B._version
    _DataOptimizer(layer.parameters()).step()
    assert layer.lora_B._version == version


def reset(layer):
    layer.reset_adapter()


CHANGES = [in_place, load, assign, swap_parameter, swap_data, swap_data_twice, change_eta, change_norm, change_dtype]
CHANGES += [vector_to_parameters, data_optimizer, reset]


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(layer, change):
    assert_fresh(layer)
    for _ in range(3):
        change(layer)
        assert_fresh(layer)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [False, True])
def test_never_stale_across_optimizer_steps(layer, optimizer, foreach):
    optimizer = optimizer([layer.lora_A, layer.lora_B], lr=0.1, foreach=foreach)
    for _ in range(4):
        assert_fresh(layer)
        optimizer.step()


def test_clear_covers_writing_through_data_by_hand(layer):
    assert_fresh(layer)
    layer.lora_B.data.mul_(3)
    layer.clear_coefficient()
    assert_fresh(layer)


def test_a_copy_has_a_cache_of_its_own(layer, calls):
    backward(layer)
    other = copy.deepcopy(layer)
    in_place(other)
    assert_fresh(other)
    assert_fresh(layer)


def test_a_cuda_graph_capture_turns_the_cache_off(layer, calls, monkeypatch):
    cache = layer._coefficient
    args = (layer.lora_A, layer.lora_B, 2.0, "row", reference.weight_coefficient)
    cache.get(*args)
    cache.get(*args)
    assert len(calls) == 1
    with capture(monkeypatch) as context:
        context.setattr(torch.Tensor, "is_cuda", True)
        cache.get(*args)
    # A replay changes the parameters with no Python running, so nothing may be remembered after it either.
    cache.get(*args)
    cache.get(*args)
    assert len(calls) == 4


def test_a_captured_optimizer_step_turns_every_cache_off(layer, calls, monkeypatch):
    from allora_kernels import coefficient_cache

    monkeypatch.setattr(coefficient_cache._steps, "captured", False)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    backward(layer)
    with capture(monkeypatch):
        optimizer.step()
    for factor in (2, 3):
        # What a replay does: new values, no version, no Python.
        layer.lora_B.data.mul_(factor)
        assert_fresh(layer)


@contextlib.contextmanager
def capture(monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield context


def test_another_stream_computes_its_own(layer, calls, monkeypatch):
    streams = iter([1, 1, 1, 1, 2, 2])
    args = (layer.lora_A, layer.lora_B, 2.0, "row", reference.weight_coefficient)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    for expected in (1, 1, 2):
        layer._coefficient.get(*args)
        assert len(calls) == expected
