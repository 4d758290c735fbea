"""`WrappedALLoRALinear` on layers that compute in their own way: values, gradients, and what is held elsewhere left alone."""

import copy
import pickle

import foreign_layers as foreign
import pytest
import torch
from comparing import assert_all_close
from foreign_layers import K, M, N, R, wrapped
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    FusedALLoRALinear,
    allora_linear,
    per_sample,
    reference,
)
from allora_kernels.layer import bases

norms = pytest.mark.parametrize("norm", reference.NORMS)


@pytest.fixture(params=[True, False], ids=["in place", "copied"])
def own(request, monkeypatch):
    """Whether a layer's tensors are taken for its own and written to, as those of a known one are."""
    monkeypatch.setattr(bases, "gives_own_tensors", lambda module: request.param)
    return request.param


def results(layer, x, g):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)


def by_autograd(layer, x, g):
    """What plain LoRA on the same base layer gives."""
    x, a, b = (t.detach().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    y = layer.base_layer(x) + x @ a.mT @ b.mT
    return y, *torch.autograd.grad(y, (x, a, b), g)


# --- values and gradients -------------------------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)])
def test_values_and_gradients_are_the_fused_layers(backend, norm, dtypes, monkeypatch):
    monkeypatch.setattr(bases, "gives_own_tensors", lambda module: True)
    layer, inputs = wrapped(norm=norm, dtypes=dtypes)

    def by(f, inputs, **kwargs):
        leaves = [t.detach().requires_grad_() for t in (inputs.x.view(2, 3, 4, K), inputs.lora_A, inputs.lora_B)]
        y = f(leaves[0], inputs.weight, inputs.bias, *leaves[1:], eta=1.5, norm=norm, **kwargs)
        return y, *torch.autograd.grad(y, leaves, inputs.g.view(2, 3, 4, N))

    ours = results(layer, inputs.x.view(2, 3, 4, K), inputs.g.view(2, 3, 4, N))
    eager, exact = by(allora_linear, inputs, backend="eager"), by(reference.allora_linear, inputs.to(torch.float64))
    assert_all_close("y dx da db", ours, eager, exact)
    assert layer.explain().backend == backend


@pytest.mark.parametrize(
    "base",
    [
        foreign.ReturnsAView,
        foreign.NeedsItsOutput,
        foreign.SavesItsOutput,
        foreign.RowsAreNoView,
        foreign.Expanded,
        foreign.PassesOn,
    ],
)
def test_a_layer_that_holds_on_to_its_tensors_is_not_written_to(backend, base):
    layer, inputs = wrapped(base, norm=None, size=(M, K, K, R))
    x, g = inputs.x.view(2, 12, K), inputs.g.view(2, 12, K)
    held = x.clone(), g.clone()
    ours = results(layer, x, g)
    assert torch.equal(x, held[0]) and torch.equal(g, held[1])
    if base is foreign.ReturnsAView:
        y = layer.base_layer.kept
        assert torch.equal(y[..., :K], y[..., K:])
    torch.testing.assert_close(ours, by_autograd(layer, x, g), rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_view_are_copied_even_where_they_are_its_own(backend, own):
    layer, inputs = wrapped(foreign.RowsAreNoView, norm=None)
    x, g = inputs.x.view(2, 12, K), inputs.g.view(2, 12, N).mT.contiguous().mT
    torch.testing.assert_close(results(layer, x, g), by_autograd(layer, x, g))


def test_what_a_hook_keeps_is_not_written_to(monkeypatch):
    # A class that is known, and so written to in place, until it has hooks.
    monkeypatch.setattr(bases, "kind_of", lambda module: "known")
    monkeypatch.setattr(bases, "obstacle_of", lambda module: None)
    layer, inputs = wrapped()
    assert "in place" in str(layer.explain())
    kept = []
    layer.base_layer.register_forward_hook(lambda module, args, y: kept.append(y))
    layer.base_layer.register_full_backward_hook(lambda module, dx, dy: kept.append(dx[0]))
    assert "in place" not in str(layer.explain()) and "copy" in str(layer.explain())
    results(layer, inputs.x, inputs.g)
    y, dx = kept
    torch.testing.assert_close(y, inputs.x @ inputs.weight.T + inputs.bias)
    torch.testing.assert_close(dx, inputs.g @ inputs.weight)


class BigTensors(TorchDispatchMode):
    """Counts the storages as large as y or x that come into being."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen, self.alive = least, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.numel() >= self.least:
                self.seen.add(t.untyped_storage().data_ptr())
                self.alive.append(t)
        return out


@norms
def test_no_tensor_of_the_size_of_x_or_y_is_made_beside_the_layers_own(monkeypatch, norm):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(bases, "gives_own_tensors", lambda module: True)
    layer, inputs = wrapped(norm=norm, size=(64, 48, 40, R))
    x = inputs.x.view(4, 16, 40).requires_grad_()

    def big_tensors(f):
        with BigTensors(64 * 40) as mode:
            f(x).backward(inputs.g.view(4, 16, 48))
        return len(mode.seen)

    assert big_tensors(layer) == big_tensors(layer.base_layer) > 0


# --- which gradients are asked for ----------------------------------------------------------------------------------


def test_parts_of_the_gradients(own):
    layer, inputs = wrapped(norm=None)
    x, g = inputs.x.view(2, 12, K), inputs.g.view(2, 12, N)
    _, dx, da, db = by_autograd(layer, x, g)
    a, b = layer.lora_A, layer.lora_B
    close = torch.testing.assert_close
    close(torch.autograd.grad(layer(x), (a, b), g), (da, db))
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(layer(leaf), leaf, g)[0], dx)
    close(torch.autograd.grad(layer(leaf), b, g)[0], db)
    a.requires_grad_(False)
    close(torch.autograd.grad(layer(leaf), (leaf, b), g), (dx, db))
    b.requires_grad_(False)
    close(torch.autograd.grad(layer(leaf), leaf, g)[0], dx)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not layer(leaf).requires_grad


def test_the_graph_can_be_used_twice(own):
    layer, inputs = wrapped()
    x = inputs.x.clone().requires_grad_()
    y = layer(x)
    leaves = (x, layer.lora_A, layer.lora_B)
    once = torch.autograd.grad(y, leaves, inputs.g, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, inputs.g), once, rtol=0, atol=0)


def test_a_backward_pass_without_the_adapter_has_nothing_of_an_earlier_one(own):
    class Side(foreign.Foreign):
        def forward(self, x):
            self.y = super().forward(x)
            return self.y.clone()

    layer, inputs = wrapped(Side)
    x = inputs.x.clone().requires_grad_()
    y = layer(x)
    # The adapter's gradients alone: what its backward pass leaves for the input's is not fetched.
    torch.autograd.grad(y, layer.lora_A, inputs.g, retain_graph=True)
    (dx,) = torch.autograd.grad(layer.base_layer.y, x, inputs.g)
    torch.testing.assert_close(dx, inputs.g @ inputs.weight)


def test_an_adapter_changed_before_the_backward_pass_is_an_error(own):
    layer, inputs = wrapped()
    y = layer(inputs.x.requires_grad_())
    with torch.no_grad():
        layer.lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_optimizer_in_the_backward_pass_does_not_change_the_gradient_of_x(own):
    layer, inputs = wrapped(norm="row")
    _, want, *_ = results(layer, inputs.x, inputs.g)

    def step(p):
        p.data -= p.grad

    for p in (layer.lora_A, layer.lora_B):
        p.register_post_accumulate_grad_hook(step)
    x = inputs.x.detach().requires_grad_()
    layer(x).backward(inputs.g)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("by", ["x", "lora_A", "lora_B"])
def test_it_has_no_second_derivative(own, loss, by):
    layer, inputs = wrapped()
    tensors = {"x": inputs.x.requires_grad_(), "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    (first,) = torch.autograd.grad(loss(layer(tensors["x"])), tensors[by], create_graph=True)
    with pytest.raises(RuntimeError, match="a rescaled gradient has no derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3, 4)])
def test_leading_dimensions(own, leading):
    layer, _ = wrapped(norm=None)
    x, g = torch.randn(*leading, K), torch.randn(*leading, N)
    torch.testing.assert_close(results(layer, x, g), by_autograd(layer, x, g))


# --- with the rest of PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(own, reentrant):
    layer, inputs = wrapped()
    plain = results(layer, inputs.x, inputs.g)
    torch.testing.assert_close(results_of_checkpoint(layer, inputs, reentrant), plain, rtol=0, atol=0)


def results_of_checkpoint(layer, inputs, reentrant):
    x = inputs.x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    layer.zero_grad()
    y.backward(inputs.g)
    return y, x.grad, layer.lora_A.grad, layer.lora_B.grad


@pytest.mark.parametrize("keeps_dtype", [True, False])
def test_autocast(backend, own, keeps_dtype):
    class KeepsDtype(foreign.Foreign):
        def forward(self, x):
            return super().forward(x).to(x.dtype)

    layer, inputs = wrapped(KeepsDtype if keeps_dtype else foreign.Foreign)
    x = inputs.x.clone().requires_grad_()
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = layer.base_layer(x)
    assert y.dtype == frozen.dtype == (torch.float32 if keeps_dtype else torch.bfloat16)
    # The adapter computes in the dtype that the layer computes in: S says which.
    assert [t.dtype for t in saved if t.shape == (M, R)] == [y.dtype]
    found = y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), inputs.g.to(y.dtype))
    assert [t.dtype for t in found[1:]] == [torch.float32] * 3
    exact = reference.allora_linear(x, inputs.weight, inputs.bias, layer.lora_A, layer.lora_B, eta=1.5, norm="row")
    exact = exact, *torch.autograd.grad(exact, (x, layer.lora_A, layer.lora_B), inputs.g)
    for ours, right in zip(found, exact):
        assert (ours - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("x_dtype, y_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_layer_that_returns_another_dtype(backend, own, x_dtype, y_dtype):
    class Casts(foreign.Foreign):
        def forward(self, x):
            return super().forward(x.to(y_dtype))

    layer, inputs = wrapped(Casts, norm=None)
    x, g = inputs.x.to(x_dtype), inputs.g.to(y_dtype)
    y, dx, da, db = results(layer, x, g)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (y_dtype, x_dtype, torch.float32, torch.float32)
    for ours, exact in zip((y, dx, da, db), by_autograd(layer, x.float(), g.float())):
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()


def test_copies_compute_the_same(own):
    layer, inputs = wrapped()
    plain = results(layer, inputs.x, inputs.g)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.lora_A is not layer.lora_A
        torch.testing.assert_close(results(other, inputs.x, inputs.g), plain, rtol=0, atol=0)
    fresh, _ = wrapped()
    nn.init.zeros_(fresh.lora_B)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(results(fresh, inputs.x, inputs.g), plain, rtol=0, atol=0)


def test_torch_compile_without_a_graph_break(backend):
    layer, inputs = wrapped()
    plain = results(layer, inputs.x, inputs.g)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs.x.clone().requires_grad_()
    y = compiled(x)
    found = y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), inputs.g)
    torch.testing.assert_close(found, plain)


def test_torch_func_grad():
    layer, inputs = wrapped(norm=None)
    ones = torch.ones(M, N)
    _, dx, da, db = results(layer, inputs.x, ones)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    by_parameters, by_x = grad(lambda p, x: functional_call(layer, p, (x,)).sum(), argnums=(0, 1))(parameters, inputs.x)
    torch.testing.assert_close((by_x, by_parameters["lora_A"], by_parameters["lora_B"]), (dx, da, db))


@norms
@pytest.mark.parametrize("batched", ["x", "adapter", "both"])
def test_vmap_is_a_call_for_each(backend, norm, batched):
    layer, inputs = wrapped(norm=norm)
    adapters = {"lora_A": torch.randn(3, R, K), "lora_B": torch.randn(3, N, R)}
    x = inputs.x.view(3, 8, K)
    if batched == "x":
        adapters = {name: t[0] for name, t in adapters.items()}
    if batched == "adapter":
        x = x[0]
    dims = {"x": (None, 0), "adapter": (0, None), "both": (0, 0)}[batched]

    def y(factors, x):
        return functional_call(layer, factors, (x,))

    gradients = grad(lambda factors, x: y(factors, x).square().sum(), argnums=(0, 1))
    for f in (y, gradients):
        calls = (
            ({name: t[i] if dims[0] == 0 else t for name, t in adapters.items()}, x[i] if dims[1] == 0 else x)
            for i in range(3)
        )
        each = _pytree.tree_map(lambda *parts: torch.stack(parts), *(f(*call) for call in calls))
        torch.testing.assert_close(vmap(f, in_dims=dims)(adapters, x), each, rtol=1e-4, atol=1e-4)


def test_disabled_it_is_its_base_layer(own):
    layer, inputs = wrapped()
    layer.enabled = False
    x = inputs.x.clone().requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x)) and "enabled=False" in repr(layer)
    assert torch.equal(torch.autograd.grad(y, x, inputs.g)[0], torch.autograd.grad(layer.base_layer(x), x, inputs.g)[0])
    assert layer.explain().plan == {"frozen_linear": "Foreign"}


@pytest.mark.parametrize("norms_only", [False, True])
def test_per_sample_gradients_are_the_fused_layers(backend, norms_only):
    layer, inputs = wrapped()
    fused = FusedALLoRALinear.from_linear(nn.Linear(K, N), R, 1.5)
    fused.load_state_dict(
        {"weight": inputs.weight, "bias": inputs.bias, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    )
    found = []
    for module in (layer, fused):
        x = inputs.x.view(6, 4, K).clone().requires_grad_()
        with per_sample.record(module, norms_only=norms_only):
            module(x).backward(inputs.g.view(6, 4, N))
        norms = per_sample.norms(module)
        per_sample.clip_(module, max_norm=float(norms.median()))
        found.append((norms, x.grad, module.lora_A.grad, module.lora_B.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
