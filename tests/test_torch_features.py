"""Features of PyTorch that the matrix of docs/compatibility.md names and that no other file tests."""

import copy
import pickle
import subprocess
import sys
import textwrap
import warnings

import foreign_layers as foreign
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from two_layers import HIDDEN, K, N, R, assert_same, make_model, trained

from allora_kernels import (
    Adapter,
    FusedALLoRALinear,
    allora_linear,
    apply_allora,
    merge_adapter,
    multi_adapter_linear,
    reference,
)

X = torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def loss_of(model, x=X):
    return model(x).float().square().mean()


def gradients(model, x=X):
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiles():
    """The number of graphs that have been compiled since the last call."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def new():
        count = counters["stats"]["unique_graphs"]
        assert not counters["graph_break"], counters["graph_break"]
        counters.clear()
        return count

    yield new
    torch._dynamo.reset()


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    x = x.detach().requires_grad_()
    loss_of(model, x).backward()
    optimizer.step()
    return {"dx": x.grad, **{name: p.detach().clone() for name, p in trained(model).items()}}


def check_compiled(model, plain, lengths, compiles, graphs, **tolerances):
    """Training on batches of those lengths by both gives the same, with as many graphs at each."""
    optimizers = [torch.optim.SGD(trained(m).values(), lr=0.1) for m in (model, plain)]
    compiled = torch.compile(model, fullgraph=True, **tolerances.pop("how"))
    for length, count in zip(lengths, graphs):
        x = torch.randn(length, K, device=next(plain.parameters()).device, dtype=plain[0].weight.dtype)
        found = train_step(compiled, optimizers[0], x)
        expected = train_step(plain, optimizers[1], x)
        assert_same({name.removeprefix("_orig_mod."): t for name, t in found.items()}, expected, **tolerances)
        assert compiles() == count, length


@pytest.mark.parametrize("norm", ["factor", "entry"])
def test_compiled_steps_neither_break_nor_recompile(backend, norm, compiles):
    how = {"backend": "aot_eager"}
    check_compiled(make_model(norm), make_model(norm), [4, 4, 4], compiles, [1, 0, 0], how=how)


@pytest.mark.parametrize("backend", ["eager"], indirect=True)
def test_a_second_length_compiles_for_all_lengths(backend, compiles):
    how = {"backend": "aot_eager"}
    check_compiled(make_model(), make_model(), [4, 7, 11], compiles, [1, 1, 0], how=how)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("norm", ["row", "token"])
def test_one_graph_takes_all_lengths(norm, backend, compiles):
    how = {"backend": "aot_eager", "dynamic": True}
    check_compiled(make_model(norm), make_model(norm), [4, 7, 11, 3], compiles, [1, 0, 0, 0], how=how)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_compiled_call_on_tensors_whose_sizes_all_change(backend, compiles):
    """Sizes of what is no parameter are symbols, too."""
    compiled = torch.compile(allora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m, n, k, r in ((8, 20, 12, 3), (7, 9, 16, 8)):
        tensors = [torch.randn(size) for size in ((m, k), (n, k), (r, k), (n, r))]
        for t in (tensors[0], *tensors[2:]):
            t.requires_grad_()

        def run(function, x, weight, a, b):
            y = function(x, weight, None, a, b)
            return y, *torch.autograd.grad(y.square().sum(), (x, a, b))

        for found, expected in zip(run(compiled, *tensors), run(allora_linear, *tensors)):
            torch.testing.assert_close(found, expected)


def test_inductor_on_the_cpu(compiles, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    how = {"backend": "inductor", "dynamic": True}
    check_compiled(make_model(), make_model(), [4, 7, 4], compiles, [1, 0, 0], how=how, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_compiled_model_under_autocast_and_checkpointing(backend, compiles):
    model, plain = make_model(), make_model()

    def loss(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(model, x, use_reentrant=False).float().square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(model, X).backward()
        loss(plain, X).backward()
    assert compiles() == 1
    for ours, expected in zip(trained(model).values(), trained(plain).values()):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=0.02, atol=1e-3)


# --- transforms of torch.func, compiled ----------------------------------------------------------------------------------


def _fused():
    layer = make_model()[0]
    return lambda x, p: functional_call(layer, p, (x,)), layer


def _wrapped():
    layer = foreign.wrapped(norm="row")[0]
    return lambda x, p: functional_call(layer, p, (x,)), layer


def _one_of_several():
    layer = make_model()[0]
    rows = torch.zeros(1, dtype=torch.int32)

    def call(x, p):
        return multi_adapter_linear(x, layer.weight, layer.bias, [Adapter(p["lora_A"], p["lora_B"])], rows)

    return call, layer


@pytest.mark.parametrize(
    ("made", "batched"), [(_fused, False), (_fused, True), (_wrapped, True), (_one_of_several, True)]
)
def test_a_compiled_transform_keeps_the_rule_or_is_refused(made, batched):
    """torch.compile differentiates what a Function computes, where it traces a transform."""
    call, layer = made()
    factors = {name: getattr(layer, name).detach() for name in ("lora_A", "lora_B")}
    gradient = grad(lambda p, x: call(x[None], p).square().sum())
    gradient = vmap(gradient, in_dims=(None, 0)) if batched else gradient
    x = torch.randn(3, layer.in_features) if batched else torch.randn(layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, x: gradient(p, x), backend="aot_eager")
    torch.testing.assert_close(compiled(factors, x), gradient(factors, x))
    torch._dynamo.reset()
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"cannot be compiled: torch\.compile would lose their rule"
    ):
        torch.compile(lambda p, x: gradient(p, x), backend="aot_eager", fullgraph=True)(factors, x)


# --- torch.export and its relatives -----------------------------------------------------------------------------------


def test_an_exported_model_takes_any_length_and_is_loaded_from_a_file(backend, tmp_path):
    model = make_model()
    rows = torch.export.Dim("rows")
    with torch.no_grad(), warnings.catch_warnings(action="error", category=UserWarning):
        torch.export.save(torch.export.export(model, (X,), dynamic_shapes=({0: rows},)), tmp_path / "model.pt2")
    x = torch.randn(17, K)
    torch.save(x, tmp_path / "x.pt")
    # Another process knows the kernels' ops by this import alone.
    load = f"""
        import torch
        {"import allora_kernels.layer.ops" if backend == "triton" else ""}
        program = torch.export.load("{tmp_path}/model.pt2")
        torch.save(program.module()(torch.load("{tmp_path}/x.pt")), "{tmp_path}/y.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(load)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x))


@pytest.mark.parametrize("norm", ["row", None])
def test_an_exported_model_is_not_trained(backend, norm):
    """It has lost the rule. Where x needs a gradient nothing raises, so exporting warns."""
    model = make_model(norm)
    with pytest.warns(UserWarning, match="gives the adapters no gradient, .* PipelineStage and not by pipeline"):
        exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_of(exported).backward()


def test_jit_trace_and_forward_mode_are_refused():
    model = make_model()
    with pytest.raises(RuntimeError, match="or merge_adapter"):
        torch.jit.trace(model, X)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .*, or merge_adapter"):
        torch.jit.script(model)
    merge_adapter(model)
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))
    with pytest.raises(NotImplementedError, match="to use it with forward mode AD"):
        torch.func.jvp(make_model(), (X,), (X,))


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row", "entry"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, "autocast's"])
def test_autocast_with_float32_adapters(backend, norm, dtype, base):
    model = make_model(norm, dtype if base == "autocast's" else base)
    with torch.autocast("cpu", dtype):
        y = model(X)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    exact = gradients(copy.deepcopy(model).double(), X.double())
    for name, p in trained(model).items():
        assert p.dtype == p.grad.dtype == torch.float32
        assert (p.grad.double() - exact[name].double()).norm() < 0.05 * exact[name].double().norm(), name


def test_grad_scaler_skips_an_overflow_and_goes_on(backend):
    model, plain = make_model(), make_model()
    # The first step's scaled gradient of y overflows, its other numbers do not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    optimizers = [torch.optim.SGD(trained(m).values(), lr=0.1) for m in (model, plain)]
    before = copy.deepcopy(trained(model))
    for step in range(3):
        optimizers[0].zero_grad()
        scaler.scale(loss_of(model) * (1e6 if step == 0 else 1)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if step == 0:
            assert_same(trained(model), before, rtol=0, atol=0)
            continue
        optimizers[1].zero_grad()
        loss_of(plain).backward()
        optimizers[1].step()
    assert scaler.get_scale() == 2.0**27
    assert_same(trained(model), trained(plain))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row", "token"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(backend, norm, use_reentrant):
    model = make_model(norm)
    expected = gradients(model)
    model.zero_grad()
    loss_of(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), X.clone().requires_grad_()).backward()
    assert_same({name: p.grad for name, p in trained(model).items()}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["row", "entry"])
def test_accumulated_micro_batches_are_one_batch(backend, norm):
    model = make_model(norm)
    expected = gradients(model)
    model.zero_grad()
    for part in X.split(2):
        (loss_of(model, part) / 3).backward()
    assert_same({name: p.grad for name, p in trained(model).items()}, expected)


# --- copies, states, parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_trains_alike_and_apart(backend, copy_of):
    model = make_model()
    other = copy_of(model)
    assert_same(gradients(other), gradients(model), rtol=0, atol=0)
    before = model(X).detach()
    with torch.no_grad():
        for p in trained(other).values():
            p.add_(1)
    assert torch.equal(model(X), before) and not torch.equal(other(X), before)


def test_functional_call_with_other_parameters(backend):
    model, other = make_model(), make_model()
    with torch.no_grad():
        for p in trained(other).values():
            p.mul_(1.5)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in trained(other).items()}
    found = torch.autograd.grad(functional_call(model, parameters, (X,)).square().mean(), list(parameters.values()))
    assert_same(dict(zip(parameters, found)), gradients(other))


def meta_model():
    with torch.device("meta"):
        return nn.Sequential(FusedALLoRALinear(K, HIDDEN, r=R), nn.Tanh(), FusedALLoRALinear(HIDDEN, N, r=R))


def test_a_model_made_on_meta_is_reset_on_the_device(backend):
    model = meta_model().to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert all(not p.isnan().any() for p in model.parameters())
    assert not model[0].weight.requires_grad and model[0].lora_A.requires_grad
    found = gradients(model)
    assert found["0.lora_B"].any() and not found["0.lora_A"].any()


def test_a_model_made_on_meta_takes_a_state(backend):
    source, model = make_model(), meta_model()
    model.load_state_dict(source.state_dict(), assign=True)
    assert not any(p.is_meta for p in model.parameters())
    assert_same(gradients(model), gradients(source), rtol=0, atol=0)


def test_a_fake_model_is_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="or fake, of a FakeTensorMode"):
        apply_allora(nn.Sequential(nn.Linear(K, N)), r=R)


@pytest.mark.parametrize("tied", ["one layer twice", "one weight in two layers", "one adapter in two layers"])
def test_tied_weights(backend, tied):
    first, second = (FusedALLoRALinear(K, K, r=R) for _ in range(2))
    for layer in (first, second):
        nn.init.normal_(layer.lora_B)
    if tied == "one layer twice":
        second = first
    elif tied == "one weight in two layers":
        second.weight = first.weight
    else:
        second.lora_A, second.lora_B = first.lora_A, first.lora_B
    model = nn.Sequential(first, nn.Tanh(), second)
    model(X).square().mean().backward()

    def by_autograd(layer, x):
        return reference.allora_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B)

    leaves = list(trained(model).values())
    expected = torch.autograd.grad(by_autograd(second, by_autograd(first, X).tanh()).square().mean(), leaves)
    for p, t in zip(leaves, expected):
        torch.testing.assert_close(p.grad, t)
