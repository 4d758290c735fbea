"""`FusedALLoRALinear` and `allora_linear` on the Triton backend, against the reference and against eager autograd."""

import pytest
import torch
from comparing import assert_all_close
from torch.utils._python_dispatch import TorchDispatchMode

from allora_kernels import FusedALLoRALinear, allora_linear, reference
from allora_kernels.layer import ops
from allora_kernels.testing import assert_close, make_inputs

norms = pytest.mark.parametrize("norm", reference.NORMS)


def run(f, inputs, norm, leading=None, **kwargs):
    x, weight, bias, lora_A, lora_B, g = inputs
    if leading:
        x, g = x.view(*leading, -1), g.view(*leading, -1)
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    y = f(leaves[0], weight, bias, *leaves[1:], eta=1.5, norm=norm, **kwargs)
    return y, *torch.autograd.grad(y, leaves, g)


@norms
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)])
def test_values_and_gradients(device, norm, dtypes):
    inputs = make_inputs(60, 53, 41, 5, *dtypes, device=device)
    results = [
        run(allora_linear, inputs, norm, (3, 4, 5), backend="triton"),
        run(allora_linear, inputs, norm, (3, 4, 5), backend="eager"),
        run(reference.allora_linear, inputs.to(torch.float64), norm, (3, 4, 5)),
    ]
    assert_all_close("y dx da db", *results)


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16, torch.float32)])
def test_plain_loras_scaling(device, dtypes):
    inputs = make_inputs(60, 53, 41, 5, *dtypes, device=device)
    results = [
        run(allora_linear, inputs, None, backend="triton", scaling=1.7),
        run(allora_linear, inputs, None, backend="eager", scaling=1.7),
        run(reference.allora_linear, inputs.to(torch.float64), None, scaling=1.7),
    ]
    assert_all_close("y dx da db", *results)


class Called(TorchDispatchMode):
    """The ops of this library that are called within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "allora":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@norms
@pytest.mark.parametrize("trained", [("lora_A", "lora_B"), ("lora_B",), ()])
@pytest.mark.parametrize("hidden", [True, False])
def test_c_is_found_on_the_way_forward_where_that_hides_it(device, norm, trained, hidden, monkeypatch):
    monkeypatch.setattr(ops, "hides_c", lambda *sizes: hidden)
    layer = FusedALLoRALinear(35, 21, r=5, norm=norm, device=device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    x = torch.randn(7, 35, device=device, requires_grad=True)
    on_the_way = bool(trained) and norm == "row" and hidden
    with Called() as called:
        y = layer(x)
    assert called.names == ["adapted_linear_and_coefficient" if on_the_way else "adapted_linear"]
    with Called() as called:
        y.sum().backward()
    # Where all gradients are asked for, it is a part of their op.
    alone = trained == ("lora_B",) and norm in reference.WEIGHT_NORMS and not on_the_way
    assert called.names.count("weight_coefficient") == alone
    with torch.no_grad(), Called() as called:
        layer(x)
    assert called.names == ["adapted_linear"]


@pytest.mark.parametrize("trained", [("lora_A", "lora_B"), ("lora_B",)])
def test_the_gradients_with_c_from_the_way_forward(device, trained, monkeypatch):
    monkeypatch.setattr(ops, "hides_c", lambda *sizes: True)
    inputs = make_inputs(60, 53, 41, 5, torch.bfloat16, device=device)

    def gradients(inputs, **kwargs):
        x, weight, bias, lora_A, lora_B, g = inputs
        leaves = {"x": x, "lora_A": lora_A, "lora_B": lora_B}
        leaves = {name: t.detach().requires_grad_(name == "x" or name in trained) for name, t in leaves.items()}
        y = allora_linear(leaves["x"], weight, bias, leaves["lora_A"], leaves["lora_B"], eta=1.5, **kwargs)
        return torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], g)

    exact = gradients(inputs.to(torch.float64), backend="eager")
    for values in zip(gradients(inputs, backend="triton"), gradients(inputs, backend="eager"), exact, strict=True):
        assert_close(*values, "gradient")


def test_c_from_the_way_forward_is_that_of_the_step(device, monkeypatch):
    """However A and B were written before it, and whatever is written to them before the backward pass."""
    monkeypatch.setattr(ops, "hides_c", lambda *tensors: True)
    layer = FusedALLoRALinear(35, 21, r=5, device=device)
    torch.nn.init.normal_(layer.lora_B)
    x, g = torch.randn(7, 35, device=device), torch.randn(7, 21, device=device)

    def gradient(write_between=lambda: None):
        y = layer(x)
        write_between()
        return torch.autograd.grad(y, layer.lora_B, g)[0]

    before = gradient()
    assert torch.equal(gradient(lambda: layer.lora_B.data.mul_(100)), before)
    larger = gradient()
    layer.lora_B.data.copy_(layer.lora_B / 100)
    assert not torch.allclose(larger, before) and torch.allclose(gradient(), before, rtol=1e-4)


def test_it_is_chosen_where_it_can_run(device):
    layer = FusedALLoRALinear(8, 4, device=device)
    explanation = layer.explain()
    assert explanation.backend == "triton" and not explanation.fallback
    assert all("Triton" in plan for plan in explanation.plan.values())
    assert "backend='triton'" in repr(layer)


def test_eager_is_taken_for_double_precision(device):
    layer = FusedALLoRALinear(8, 4, device=device, dtype=torch.float64)
    assert layer.explain().backend == "eager" and "float64" in layer.explain().reason
    with pytest.raises(ValueError, match="float64"):
        allora_linear(*make_inputs(2, 3, 4, 2, torch.float64, device=device)[:5], backend="triton")


def test_autocast_runs_the_kernels_in_its_dtype(device):
    layer = FusedALLoRALinear(41, 53, r=3, device=device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 41, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    exact = x.double() @ (layer.weight + layer.lora_B @ layer.lora_A).double().T + layer.bias.double()
    assert (y.double() - exact).abs().max() < 0.1
