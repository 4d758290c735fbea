"""`allora_linear` as torch code: derivatives, what is computed and saved, dtypes, and bad input."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from allora_kernels import allora_linear, reference
from allora_kernels.layer import backend, functional
from allora_kernels.testing import make_inputs

norms = pytest.mark.parametrize("norm", reference.NORMS)


@pytest.fixture
def inputs():
    return make_inputs(6, 5, 7, 3, torch.float64)


@norms
def test_gradients_are_the_references(inputs, norm):
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def run(f):
        return torch.autograd.grad(f(x, weight, bias, lora_A, lora_B, eta=0.7, norm=norm), leaves, g)

    torch.testing.assert_close(run(allora_linear), run(reference.allora_linear), rtol=1e-12, atol=1e-12)


def test_plain_lora_passes_gradcheck(inputs):
    x, weight, bias, lora_A, lora_B, _ = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return allora_linear(x, weight, bias, lora_A, lora_B, norm=None)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("scaling", [2, 0.25, -1.5, 0])
def test_scaling_is_plain_loras_alpha_over_r(inputs, scaling):
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = allora_linear(x, weight, bias, lora_A, lora_B, norm=None, scaling=scaling)
    plain = x @ (weight + scaling * (lora_B @ lora_A)).mT + bias
    for other in (plain, reference.allora_linear(x, weight, bias, lora_A, lora_B, norm=None, scaling=scaling)):
        torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(v, leaves, g, retain_graph=True) for v in (y, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_scaling_keeps_dtypes_and_makes_nothing_of_the_inputs_length(adapter_dtype):
    x, weight, bias, lora_A, lora_B, g = make_inputs(6, 5, 7, 3, torch.bfloat16, adapter_dtype)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = allora_linear(x, weight, bias, lora_A, lora_B, norm=None, scaling=3.0)
    assert y.dtype == torch.bfloat16
    assert sorted(tuple(t.shape) for t in saved if t.dim() and t.shape[0] == 6) == [(6, 3), (6, 7)]
    for grad, leaf in zip(torch.autograd.grad(y, leaves, g), leaves):
        assert grad.dtype == leaf.dtype


def test_scaling_compiles_whole(inputs):
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return allora_linear(x, weight, bias, lora_A, lora_B, norm=None, scaling=2.0)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*leaves), leaves, g)
    torch.testing.assert_close(ours, torch.autograd.grad(f(*leaves), leaves, g))


def test_scaling_under_a_record_is_refused(inputs):
    with pytest.raises(ValueError, match=r"scaling=2.0 cannot be recorded"):
        functional.apply(*inputs[:5], 2.0, None, sink=lambda *args: None, scaling=2.0)


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("norm", ["row", None])
@pytest.mark.parametrize("by", [0, 1, 2], ids=["x", "lora_A", "lora_B"])
def test_a_second_derivative_is_refused(inputs, loss, norm, by):
    """Also where the gradient that comes in does not require grad itself: a gradient penalty would be left out in silence."""
    x, weight, bias, lora_A, lora_B, _ = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return loss(allora_linear(x, weight, bias, lora_A, lora_B, norm=norm))

    (first,) = torch.autograd.grad(f(*leaves), leaves[by], create_graph=True)
    with pytest.raises(RuntimeError, match="a rescaled gradient has no derivative"):
        first.square().sum().backward()
    plain = [t.detach() for t in leaves]
    gradient = torch.func.grad(f, by)
    assert not gradient(*plain).requires_grad
    torch.testing.assert_close(gradient(*plain), first)
    with pytest.raises(RuntimeError, match="a rescaled gradient has no derivative"):
        torch.func.grad(lambda *leaves: gradient(*leaves).square().sum(), 1)(*plain)


def test_a_checkpointed_layer_is_differentiated_with_create_graph(inputs):
    """Where what was saved is given out once."""
    x, weight, bias, lora_A, lora_B, _ = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return allora_linear(x, weight, bias, lora_A, lora_B).square().sum()

    want = torch.autograd.grad(f(*leaves), leaves)
    y = checkpoint(f, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, create_graph=True), want)


@norms
@pytest.mark.parametrize("needed", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_B"), ("lora_A", "lora_B")])
def test_only_needed_gradients_are_computed(inputs, norm, needed, monkeypatch):
    tensors = inputs._asdict()
    g = tensors.pop("g")
    for name in needed:
        tensors[name].requires_grad_()
    seen = []
    original = reference.adapter_grads
    monkeypatch.setattr(reference, "adapter_grads", lambda *args: seen.append(args) or original(*args))
    allora_linear(**tensors, norm=norm).backward(g)
    assert {name for name, t in tensors.items() if t is not None and t.grad is not None} == set(needed)
    if needed == ("x",):
        assert seen == []
    else:
        (call,) = seen
        need_ds, dtype_a, dtype_b = call[-3:]
        assert (need_ds, dtype_a is not None, dtype_b is not None) == tuple(
            n in needed for n in ("x", "lora_A", "lora_B")
        )


def test_saves_x_and_s_and_nothing_else_of_the_inputs_length(inputs):
    x, weight, bias, lora_A, lora_B, _ = inputs
    parameters = {t.data_ptr() for t in (weight, lora_A.requires_grad_(), lora_B.requires_grad_())}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        allora_linear(x.requires_grad_(), weight, bias, lora_A, lora_B)
    of_the_call = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in of_the_call) == [(6, 3), (6, 7)]
    assert any(t.data_ptr() == x.data_ptr() for t in of_the_call)


def test_a_frozen_adapter_saves_nothing_of_the_inputs_length(inputs):
    x, weight, bias, lora_A, lora_B, _ = inputs
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        allora_linear(x.requires_grad_(), weight, bias, lora_A, lora_B)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (weight, lora_A, lora_B)}


@norms
def test_an_empty_batch_has_zero_gradients(inputs, norm):
    x, weight, bias, lora_A, lora_B, _ = inputs
    leaves = [t.requires_grad_() for t in (lora_A, lora_B)]
    y = allora_linear(x[:0].view(0, 2, 7), weight, bias, *leaves, norm=norm)
    assert y.shape == (0, 2, 5)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_one_row_without_a_batch_dimension(inputs):
    x, weight, bias, lora_A, lora_B, _ = inputs
    y = allora_linear(x[0], weight, bias, lora_A, lora_B)
    assert y.shape == (5,)
    torch.testing.assert_close(y, allora_linear(x, weight, bias, lora_A, lora_B)[0])


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_dtypes(adapter_dtype):
    x, weight, bias, lora_A, lora_B, g = make_inputs(6, 5, 7, 3, torch.bfloat16, adapter_dtype)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    y = allora_linear(x, weight, bias, lora_A, lora_B)
    assert y.dtype == torch.bfloat16
    for grad, leaf in zip(torch.autograd.grad(y, leaves, g), leaves):
        assert grad.dtype == leaf.dtype


def test_under_autocast_it_is_the_call_in_autocasts_dtype():
    x, weight, bias, lora_A, lora_B, _ = make_inputs(6, 5, 7, 3)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(x, weight, bias, lora_A, lora_B)
    assert y.dtype == torch.bfloat16
    exact = reference.allora_linear(*make_inputs(6, 5, 7, 3).to(torch.float64)[:5])
    assert 0 < (y.double() - exact).abs().max() < 0.05
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_a_frozen_adapter_under_autocast_has_the_same_gradient_of_x():
    x, weight, bias, lora_A, lora_B, _ = make_inputs(6, 5, 7, 3)
    grads = []
    for trained in (True, False):
        x, lora_A = x.detach().requires_grad_(), lora_A.detach().requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16):
            y = allora_linear(x, weight, bias, lora_A, lora_B)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


@norms
def test_a_backward_pass_inside_autocast_is_the_one_outside(norm):
    x, weight, bias, lora_A, lora_B, _ = make_inputs(6, 5, 7, 3)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(x, weight, bias, lora_A, lora_B, norm=norm)
        inside = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(y.sum(), leaves)):
        assert torch.equal(a, b)


def test_autocast_leaves_doubles_alone(inputs):
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(*inputs[:5])
    assert torch.equal(y, allora_linear(*inputs[:5]))


def test_an_adapter_of_doubles_runs_eagerly(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, bias, lora_A, lora_B, _ = make_inputs(6, 5, 7, 3, torch.float32, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = allora_linear(x, weight, bias, lora_A.requires_grad_(), lora_B)
    y.sum().backward()
    assert lora_A.grad.dtype == torch.float64


def test_the_graph_compiles_whole(inputs):
    x, weight, bias, lora_A, lora_B, g = inputs
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]

    def f(x, lora_A, lora_B):
        return allora_linear(x, weight, bias, lora_A, lora_B)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*leaves), leaves, g)
    torch.testing.assert_close(ours, torch.autograd.grad(f(*leaves), leaves, g))


def test_compiling_does_not_ask_what_torch_2_11_cannot_trace(inputs, monkeypatch):
    # Of doubles, which autocast leaves alone, nothing is asked.
    tensors = [t.float() for t in inputs[:5]]
    expected = allora_linear(*tensors)

    def untraceable(kind):
        raise NotImplementedError

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    compiled = torch.compile(allora_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), expected)


BAD = {
    "x of another width": ({"x": lambda t: t[:, :3]}, ValueError, r"x must be .* K = 7"),
    "x without dimensions": ({"x": lambda t: t[0, 0]}, ValueError, "x must be"),
    "x of integers": ({"x": lambda t: t.long()}, TypeError, "x must have a floating-point dtype"),
    "x not a tensor": ({"x": lambda t: t.tolist()}, TypeError, "x must be a Tensor, got list"),
    "x in another dtype": (
        {"x": lambda t: t.float()},
        ValueError,
        "cast x to the weight's dtype, or use torch.autocast",
    ),
    "weight with three dimensions": ({"weight": lambda t: t[None]}, ValueError, r"weight must be \[N, K\]"),
    "an empty weight": ({"weight": lambda t: t[:0]}, ValueError, "at least one row"),
    "bias of another length": ({"bias": lambda t: t[:2]}, ValueError, r"bias must be \[N\] = \[5\]"),
    "lora_A of another width": ({"lora_A": lambda t: t[:, :3]}, ValueError, r"lora_A must be \[R, K\] with K = 7"),
    "rank zero": (
        {"lora_A": lambda t: t[:0], "lora_B": lambda t: t[:, :0]},
        ValueError,
        "r must be between 1 and 256, got 0",
    ),
    "bias in another dtype": ({"bias": lambda t: t.float()}, ValueError, "bias is torch.float32 but weight is"),
    "lora_B transposed": ({"lora_B": lambda t: t.T}, ValueError, r"lora_B must be \[N, R\] = \[5, 3\]"),
    "lora_B on another device": ({"lora_B": lambda t: t.to("meta")}, ValueError, "lora_B is on meta but x is on cpu"),
    "a trained weight": ({"weight": lambda t: t.requires_grad_()}, ValueError, "weight is frozen"),
    "a trained bias": ({"bias": lambda t: t.requires_grad_()}, ValueError, "bias is frozen"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_tensors_are_named(inputs, change, error, message):
    tensors = inputs._asdict()
    tensors.pop("g")
    for name, f in change.items():
        tensors[name] = f(tensors[name])
    with pytest.raises(error, match=message):
        allora_linear(**tensors)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"eta": 0.0}, ValueError, r"eta must be finite and > 0 .*got 0.0"),
        ({"eta": -1}, ValueError, r"eta must be finite and > 0 .*got -1"),
        ({"eta": math.nan}, ValueError, "got nan"),
        ({"eta": 1e-25}, ValueError, "from 1e-18 to 1e"),
        ({"eta": 1e25}, ValueError, "from 1e-18 to 1e"),
        ({"eta": math.inf}, ValueError, "got inf"),
        ({"eta": "2"}, TypeError, "eta must be a float, got str"),
        ({"norm": "rows"}, ValueError, "norm must be one of .*'row'.*got 'rows'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"scaling": 2.0}, ValueError, r"scaling=2.0 with norm='row': .*use scaling=1, or norm=None"),
        ({"scaling": math.inf, "norm": None}, ValueError, "scaling must be finite, got inf"),
        ({"scaling": math.nan, "norm": None}, ValueError, "scaling must be finite, got nan"),
        ({"scaling": "2", "norm": None}, TypeError, "scaling must be a float, got str"),
        ({"scaling": True, "norm": None}, TypeError, "scaling must be a float, got bool"),
    ],
)
def test_bad_rules_are_named(inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        allora_linear(*inputs[:5], **kwargs)


def test_the_reference_refuses_a_scaled_rule(inputs):
    with pytest.raises(ValueError, match="only plain LoRA"):
        reference.allora_linear(*inputs[:5], scaling=2.0)


def test_ranks_over_the_limit_are_refused():
    with pytest.raises(ValueError, match="r must be between 1 and 256, got 257"):
        allora_linear(*make_inputs(2, 300, 300, 257)[:5])


def test_triton_on_cpu_tensors_says_what_would_work(inputs):
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*float64.*backend='eager' can"):
        allora_linear(*inputs[:5], backend="triton")
    with pytest.raises(ValueError, match=r"cpu tensors.*TRITON_INTERPRET=1"):
        allora_linear(*inputs.to(torch.float32)[:5], backend="triton")


def test_a_machine_without_triton_has_the_eager_backend(inputs, monkeypatch):
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = backend.choose(torch.device("cpu"), torch.float32)
    assert choice.name == "eager" and "not installed" in choice.reason
    with pytest.raises(ValueError, match="pip install triton"):
        allora_linear(*inputs.to(torch.float32)[:5], backend="triton")


def test_a_gpu_that_falls_back_is_told_once(monkeypatch):
    choice = backend.choose(torch.device("cuda"), torch.float64)
    assert choice.name == "eager" and choice.fallback and "float64" in choice.reason
    assert not backend.choose(torch.device("cpu"), torch.float64).fallback

    monkeypatch.setattr(functional._backend, "choose", lambda *args: choice._replace(reason="a test"))
    backend.warn_fallback.cache_clear()
    inputs = make_inputs(2, 3, 4, 1)
    with pytest.warns(RuntimeWarning, match="eager backend on a GPU: a test") as caught:
        for _ in range(3):
            allora_linear(*inputs[:5])
    assert len(caught) == 1
