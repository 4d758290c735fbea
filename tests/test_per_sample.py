"""`per_sample`: what is recorded, clipped and measured, on both backends, and what is refused."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import csrc_triton
from allora_kernels import FusedALLoRALinear, per_sample, reference

norms_of_rules = pytest.mark.parametrize("norm", reference.NORMS)


class Net(nn.Module):
    """Two adapted layers with something between them; the second sees what the first made."""

    def __init__(self, norm="row", dtype=torch.float32, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.first = FusedALLoRALinear(11, 9, r=3, norm=norm, eta=1.5, dtype=dtype, **kwargs)
        self.second = FusedALLoRALinear(9, 5, r=2, norm=norm, eta=1.5, dtype=dtype, **kwargs)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.lora_B)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora" in name}


def recorded(model):
    return {name: p.grad_sample for name, p in adapters(model).items()}


def one_by_one(model, samples, loss=lambda y: y.square().sum()):
    """The gradient of each sample alone, by plain backward passes: {name: [b, *shape]}."""
    model = copy.deepcopy(model).double()
    rows = {name: [] for name in adapters(model)}
    for x in samples:
        model.zero_grad()
        loss(model(x.double())).backward()
        for name, p in adapters(model).items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def all_close(ours, expected, **kwargs):
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=2e-5, atol=2e-5, msg=name, **kwargs)


def norms_of(grads):
    return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def clipped(grads, max_norm):
    w = (max_norm / norms_of(grads)).clamp(max=1)
    return {name: torch.einsum("b,b...->...", w, g) for name, g in grads.items()}


@norms_of_rules
@pytest.mark.parametrize("shape", [(4, 11), (3, 6, 11), (2, 3, 2, 11), (1, 7, 11)])
def test_each_sample_has_its_own_gradient(backend, norm, shape):
    model, x = Net(norm), torch.randn(shape)
    with per_sample.record(model):
        model(x).square().sum().backward()
    expected = one_by_one(model, x[:, None])
    all_close(recorded(model), expected)
    for name, p in adapters(model).items():
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad, msg=name)
    torch.testing.assert_close(per_sample.norms(model), norms_of(expected).float())


@norms_of_rules
def test_ragged_samples(backend, norm):
    model, x = Net(norm), torch.randn(1, 13, 11)
    starts = torch.tensor([0, 4, 4, 5, 13], dtype=torch.int32)
    with per_sample.record(model, starts):
        model(x).square().sum().backward()
    all_close(recorded(model), one_by_one(model, [x[:, a:b] for a, b in itertools.pairwise(starts.tolist())]))
    assert not recorded(model)["first.lora_A"][1].any()


@pytest.mark.parametrize("norms_only", [False, True])
@norms_of_rules
def test_clipping_takes_one_backward_pass(backend, norm, norms_only):
    model, x = Net(norm), torch.randn(5, 3, 11)
    expected = one_by_one(model, x)
    max_norm = norms_of(expected).median().item()
    with per_sample.record(model, norms_only=norms_only):
        model(x).square().sum().backward()
    assert hasattr(model.first.lora_A, "grad_sample") != norms_only
    returned = per_sample.clip_(model, max_norm)
    torch.testing.assert_close(returned, norms_of(expected).float())
    torch.testing.assert_close(per_sample.norms(model), returned)
    all_close({name: p.grad for name, p in adapters(model).items()}, clipped(expected, max_norm))


def test_rows_that_cancel_leave_a_norm_and_not_nan():
    for seed in range(20):
        torch.manual_seed(seed)
        layer = FusedALLoRALinear(64, 32, r=4)
        nn.init.normal_(layer.lora_B)
        x, g = torch.randn(2, 1, 64).expand(2, 4, 64), torch.randn(2, 4, 32)
        g = g - g.mean(1, keepdim=True)
        with per_sample.record(layer, norms_only=True):
            layer(x).backward(g)
        norms = per_sample.clip_(layer, 1.0)
        # Each row's gradient has a norm in the hundreds: what is left of their sum is rounding.
        assert (norms < 0.05).all(), norms
        assert layer.lora_A.grad.isfinite().all() and layer.lora_B.grad.isfinite().all()


@pytest.mark.parametrize("norms_only", [False, True])
def test_micro_batches_follow_each_other(backend, norms_only):
    model, x = Net(), torch.randn(6, 3, 11)
    expected = one_by_one(model, x)
    with per_sample.record(model, norms_only=norms_only):
        for part in (x[:1], x[1:4], x[4:]):
            model(part).square().sum().backward()
    torch.testing.assert_close(per_sample.norms(model), norms_of(expected).float())
    if not norms_only:
        all_close(recorded(model), expected)
        torch.testing.assert_close(model.first.lora_A.grad_sample.sum(0), model.first.lora_A.grad)
    per_sample.clip_(model, 0.5)
    all_close({name: p.grad for name, p in adapters(model).items()}, clipped(expected, 0.5))


def test_ragged_micro_batches():
    model, x = Net(), torch.randn(9, 11)
    with per_sample.record(model, torch.tensor([0, 2, 5], dtype=torch.int32)) as recording:
        model(x[:5]).square().sum().backward()
        recording.set_cu_seqlens(torch.tensor([0, 4], dtype=torch.int32))
        model(x[5:]).square().sum().backward()
    all_close(recorded(model), one_by_one(model, [x[:2], x[2:5], x[5:]]))


def test_a_layer_that_runs_twice_adds_up():
    layer = FusedALLoRALinear(6, 6, r=2)
    nn.init.normal_(layer.lora_B)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(4, 3, 6)
    with per_sample.record(model):
        model(x).square().sum().backward()
    all_close(recorded(model), one_by_one(model, x))


@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("norms_only", [False, True])
def test_no_sample_and_one(backend, b, norms_only):
    model = Net()
    with per_sample.record(model, norms_only=norms_only):
        model(torch.randn(b, 3, 11)).square().sum().backward()
    assert per_sample.clip_(model, 1.0).shape == (b,)
    assert model.first.lora_A.grad.any() == bool(b)
    with pytest.raises(ValueError, match="at least 2 samples"):
        per_sample.noise_scale(model)


@pytest.mark.parametrize("norms_only", [False, True])
def test_noise_scale_is_unbiased(norms_only):
    model, x = Net(), torch.randn(400, 2, 11)
    truth = one_by_one(model, x)
    flat = torch.cat([g.flatten(1) for g in truth.values()], dim=1)
    with per_sample.record(model, norms_only=norms_only):
        (model(x).square().sum() / 400).backward()
    whole = per_sample.noise_scale(model)
    # The estimators by their definition: the sample covariance, and the mean less its own noise.
    trace = flat.var(0, unbiased=True).sum()
    squared = flat.mean(0).square().sum() - trace / 400
    assert whole.value.item() == pytest.approx((trace / squared).item(), rel=1e-4)
    assert whole.trace.item() * 400**2 == pytest.approx(trace.item(), rel=1e-4)
    with per_sample.record(model, norms_only=norms_only):
        model(x).square().sum().backward()
    # The loss's factor does not matter.
    assert per_sample.noise_scale(model).value.item() == pytest.approx(whole.value.item(), rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("norms_only", [False, True])
def test_checkpointing_does_not_count_twice(backend, use_reentrant, norms_only):
    model, x = Net(), torch.randn(4, 3, 11)
    expected = one_by_one(model, x)
    with per_sample.record(model, norms_only=norms_only):
        for part in (x[:3], x[3:]):
            y = checkpoint(model.first, part.requires_grad_(), use_reentrant=use_reentrant)
            checkpoint(model.second, torch.tanh(y), use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(per_sample.norms(model), norms_of(expected).float())
    if not norms_only:
        all_close(recorded(model), expected)


# --- which samples --------------------------------------------------------------------------------------------------


class Repeated(Net):
    """The first layer runs `times` times within a forward pass; checkpointed where its input has a gradient."""

    def __init__(self, times=3, use_reentrant=None):
        super().__init__()
        self.first = FusedALLoRALinear(11, 11, r=3)
        self.second = FusedALLoRALinear(11, 5, r=2)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.lora_B)
        self.times, self.use_reentrant = times, use_reentrant

    def forward(self, x):
        for _ in range(self.times):
            step = lambda x: torch.tanh(self.first(x))  # noqa: E731
            x = (
                step(x)
                if self.use_reentrant is None or not x.requires_grad
                else checkpoint(step, x, use_reentrant=self.use_reentrant)
            )
        return self.second(x)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_layer_that_runs_thrice_under_checkpointing_counts_its_samples_once(use_reentrant):
    model, x = Repeated(use_reentrant=use_reentrant), torch.randn(4, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach())
    with per_sample.record(model):
        model(x).square().sum().backward()
    all_close(recorded(model), expected)
    per_sample.clip_(model, 0.5)
    all_close({name: p.grad for name, p in adapters(model).items()}, clipped(expected, 0.5))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_model_that_is_checkpointed_whole(use_reentrant, evaluated):
    """The backward pass calls the recorded model itself again; a pass without gradients is none that it might be."""
    model, x = Net(), torch.randn(4, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach())
    with per_sample.record(model):
        for scale in (1, 2):
            y = checkpoint(model, scale * x, use_reentrant=use_reentrant)
            if evaluated:
                with torch.no_grad():
                    model(x[:3])
            y.square().sum().backward()
    twice = one_by_one(model, 2 * x.detach())
    all_close(recorded(model), {name: torch.cat([g, twice[name]]) for name, g in expected.items()})


@pytest.mark.parametrize("mixed", [False, True])
def test_several_models_checkpointed_whole_in_one_backward_pass(mixed):
    model, x = Net(), torch.randn(8, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach())
    with per_sample.record(model, samples=8):
        first = checkpoint(model, x[:4], use_reentrant=True)
        second = model(x[4:]) if mixed else checkpoint(model, x[4:], use_reentrant=True)
        (first.square().sum() + second.square().sum()).backward()
    all_close(recorded(model), expected)


def test_checkpoints_inside_checkpoints():
    class Nested(Repeated):
        def forward(self, x):
            run = super().forward
            return checkpoint(run, x, use_reentrant=True) if x.requires_grad else run(x)

    model, x = Nested(times=2, use_reentrant=True), torch.randn(4, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach())
    with per_sample.record(model):
        model(x).square().sum().backward()
        model(2 * x).square().sum().backward()
    twice = one_by_one(model, 2 * x.detach())
    all_close(recorded(model), {name: torch.cat([g, twice[name]]) for name, g in expected.items()})


@pytest.mark.parametrize("norms_only", [False, True])
def test_two_forward_passes_in_one_backward_pass(norms_only):
    model, x = Net(), torch.randn(8, 3, 11)
    expected = one_by_one(model, x)

    def run(**kwargs):
        with per_sample.record(model, norms_only=norms_only, **kwargs):
            (model(x[:4]).square().sum() + model(x[4:]).square().sum()).backward()

    with pytest.raises(ValueError, match=r"reached 2 forward passes, of \[4, 4\] samples.*samples=8.*samples=4"):
        run()
    model.zero_grad()
    run(samples=8)
    torch.testing.assert_close(per_sample.norms(model), norms_of(expected).float())
    if norms_only:
        with pytest.raises(ValueError, match="norms of its gradients do not add up"):
            run(samples=4)
    else:
        run(samples=4)
        all_close(recorded(model), {name: g[:4] + g[4:] for name, g in expected.items()})
    with pytest.raises(ValueError, match=r"told of 7 samples a backward pass, but layer 'first' had \[4, 4\]"):
        run(samples=7)


def test_samples_follow_the_order_of_forward_passes():
    model, x = Net(), torch.randn(6, 3, 11)
    expected = one_by_one(model, x)
    with per_sample.record(model):
        losses = [model(part).square().sum() for part in x.split(2)]
        for loss in reversed(losses):
            loss.backward()
    all_close(recorded(model), expected)


def test_two_losses_of_one_forward_pass_add_up():
    model, x = Net(), torch.randn(4, 3, 11)
    with per_sample.record(model):
        y = model(x)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
    all_close(recorded(model), one_by_one(model, x, lambda y: y.square().sum() + y.sum()))


def test_reentrant_checkpointing_of_one_of_several_forward_passes():
    model, x = Repeated(use_reentrant=True), torch.randn(4, 3, 11, requires_grad=True)

    def run(model):
        with per_sample.record(model):
            losses = [model(x).square().sum(), model(x).square().sum()]
            losses[0].backward()

    with pytest.raises(ValueError, match="which one cannot be told: pass use_reentrant=False"):
        run(model)
    model.use_reentrant = False
    run(model)
    with torch.no_grad():
        model(x)
    model.use_reentrant = True
    with per_sample.record(model):
        with torch.no_grad():
            model(x)  # no backward pass will come to this one
        model(x).square().sum().backward()
    all_close(recorded(model), one_by_one(model, x.detach()))


def test_checkpoints_of_several_forward_passes_of_different_sizes():
    model, x = Repeated(use_reentrant=False), torch.randn(7, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach())
    for order in ((0, 1), (1, 0)):
        with per_sample.record(model):
            losses = [model(part).square().sum() for part in (x[:4], x[4:])]
            for i in order:
                losses[i].backward()
        all_close(recorded(model), expected)


class TimeMajor(Net):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@norms_of_rules
@pytest.mark.parametrize("norms_only", [False, True])
def test_a_time_major_model(backend, norm, norms_only):
    model, x = TimeMajor(norm), torch.randn(4, 3, 11, requires_grad=True)
    expected = one_by_one(model, x.detach()[:, None])
    match = r"layer 'first' has inputs for 3 \(\[3, 4, 11\]\), but no input of the model has 3 .* batch_dim"
    with pytest.raises(ValueError, match=match), per_sample.record(model):
        model(x)
    told = pytest.raises(ValueError, match=r"told of 2 samples, but layer 'first' has inputs for 3")
    with told, per_sample.record(model, samples=2):
        model(x)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    with per_sample.record(model, norms_only=norms_only, batch_dim=1):
        model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, plain)
    torch.testing.assert_close(per_sample.norms(model), norms_of(expected).float())
    if not norms_only:
        all_close(recorded(model), expected)
    per_sample.clip_(model, 0.5)
    all_close({name: p.grad for name, p in adapters(model).items()}, clipped(expected, 0.5))


def test_a_flattened_batch_is_no_batch_of_tokens():
    class Flat(Net):
        def forward(self, x):
            return super().forward(x.flatten(0, 1))

    model = Flat()
    match = r"inputs for 12 .*leading dimension \(they have \[4\]\)"
    with pytest.raises(ValueError, match=match), per_sample.record(model):
        model(torch.randn(4, 3, 11))


def test_layers_called_one_by_one_and_twice():
    model, x = Net(), torch.randn(4, 3, 11)
    match = "layer 'first' ran more than once, not within a call of the recorded model"
    with pytest.raises(ValueError, match=match), per_sample.record(model):
        (model.first(x[:2]).sum() + model.first(x[2:]).sum()).backward()


@pytest.mark.parametrize("kwargs, error", [
    ({"batch_dim": -1}, ValueError), ({"batch_dim": 1.0}, TypeError), ({"samples": True}, TypeError),
    ({"samples": -2}, ValueError), ({"batch_dim": 1, "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, ValueError),
])  # fmt: skip
def test_bad_batch_dim_and_samples(kwargs, error):
    model = Net()

    def run():
        with per_sample.record(model, **kwargs):
            pass

    refused(model, error, "batch_dim|samples", run)


def test_autocast(backend):
    model, x = Net(), torch.randn(4, 3, 11)
    with per_sample.record(model), torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    expected = one_by_one(model, x)
    for name, g in recorded(model).items():
        assert g.dtype == torch.float32
        assert (g - expected[name]).norm() < 0.03 * expected[name].norm()
        torch.testing.assert_close(g.sum(0), adapters(model)[name].grad)


def test_frozen_halves_of_an_adapter(backend):
    model, x = Net(), torch.randn(4, 3, 11)
    model.first.lora_A.requires_grad_(False)
    model.second.lora_B.requires_grad_(False)
    with per_sample.record(model):
        model(x).square().sum().backward()
    expected = one_by_one(model, x)
    assert not hasattr(model.first.lora_A, "grad_sample") and not hasattr(model.second.lora_B, "grad_sample")
    for name in ("first.lora_B", "second.lora_A"):
        torch.testing.assert_close(recorded_one(model, name).double(), expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("norms_only", [False, True])
def test_norms_noise_and_clipping_of_frozen_halves(norms_only):
    model, x = Net(), torch.randn(4, 3, 11)
    model.first.lora_A.requires_grad_(False)
    model.second.lora_B.requires_grad_(False)
    exact = one_by_one(model, x)
    with per_sample.record(model, norms_only=norms_only):
        model(x).square().sum().backward()
    of_samples = torch.cat([exact[name].flatten(1) for name in ("first.lora_B", "second.lora_A")], 1)
    trace = per_sample.noise_scale(model).trace
    torch.testing.assert_close(trace.double(), of_samples.var(0).sum(), rtol=1e-4, atol=0)
    norms = of_samples.norm(dim=1)
    torch.testing.assert_close(per_sample.clip_(model, norms.median().item()).double(), norms, rtol=1e-4, atol=0)
    factors = norms.median() / norms.clamp_min(norms.median())
    for name in ("first.lora_B", "second.lora_A"):
        expected = torch.einsum("b,b...->...", factors, exact[name])
        torch.testing.assert_close(adapters(model)[name].grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert model.first.lora_A.grad is None and model.second.lora_B.grad is None


def recorded_one(model, name):
    return dict(model.named_parameters())[name].grad_sample


@norms_of_rules
def test_vmap_of_grad_gives_the_same_numbers(backend, norm):
    model, x = Net(norm), torch.randn(4, 3, 11)
    params = {name: p.detach() for name, p in adapters(model).items()}
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in params}

    def loss(params, x):
        return functional_call(model, {**params, **rest}, (x,)).square().sum()

    all_close(vmap(grad(loss), in_dims=(None, 0))(params, x), one_by_one(model, x))


def test_vmap_takes_one_sweep_for_all_samples(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from allora_kernels.layer import vmap_rules

    calls = []
    sample_grads, one_by_one_ = csrc_triton.sample_grads, vmap_rules._one_by_one
    monkeypatch.setattr(csrc_triton, "sample_grads", lambda *args: calls.append("sample_grads") or sample_grads(*args))
    monkeypatch.setattr(vmap_rules, "_one_by_one", lambda op, *args: calls.append(str(op)) or one_by_one_(op, *args))
    layer = FusedALLoRALinear(11, 5, r=3)
    nn.init.normal_(layer.lora_B)
    params = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}

    def loss(params, x, scale):
        frozen = {"weight": layer.weight, "bias": layer.bias}
        params = {"lora_A": params["lora_A"], "lora_B": params["lora_B"] * scale}
        return functional_call(layer, {**params, **frozen}, (x,)).square().sum()

    x, one = torch.randn(4, 3, 11), torch.ones(())
    together = vmap(grad(loss), in_dims=(None, 0, None))(params, x, one)
    assert calls == ["sample_grads"]
    # An adapter of its own for each sample: no launch can take them all.
    apart = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, torch.ones(4))
    assert calls[1:] == ["allora.adapted_linear", "allora.adapter_grads"]
    for name in params:
        torch.testing.assert_close(together[name], apart[name])


def test_nothing_is_kept_or_paid_outside(monkeypatch):
    from allora_kernels.per_sample import reference as sample_reference

    calls = []
    original = sample_reference.sample_grads
    monkeypatch.setattr(sample_reference, "sample_grads", lambda *args: calls.append(1) or original(*args))
    model, x = Net(), torch.randn(4, 3, 11)
    before = [sorted(vars(m)) for m in model.modules()]
    model(x).sum().backward()
    assert not calls and not hasattr(model.first.lora_A, "grad_sample")
    with per_sample.record(model):
        model(x).sum().backward()
    assert len(calls) == 2
    model(x).sum().backward()
    assert len(calls) == 2 and [sorted(vars(m)) for m in model.modules()] == before
    assert not model._forward_pre_hooks
    per_sample.clear(model)
    assert not hasattr(model.first.lora_A, "grad_sample")


def test_norms_only_keeps_nothing_of_size_b(monkeypatch):
    model, x = Net(), torch.randn(50, 3, 11)
    with per_sample.record(model, norms_only=True) as recording:
        model(x).square().sum().backward()
        for layer in (model.first, model.second):
            for call in recording.kept()[layer]["default"].calls:
                assert call.a is None and call.b is None and call.squares.shape == (50,)
    per_sample.clip_(model, 1.0)
    with pytest.raises(RuntimeError, match="clipped already"):
        per_sample.clip_(model, 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_s_step_does_not_change_what_was_recorded(fused, backend):
    """A fused one writes to the factors without a trace."""
    model, x = Net(), torch.randn(5, 3, 11)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=0.1, fused=fused)
    with per_sample.record(model, norms_only=True):
        model(x).square().sum().backward()
    before = [p.grad.clone() for p in adapters(model).values()]
    optimizer.step()
    per_sample.clip_(model, 1e9)
    for p, expected in zip(adapters(model).values(), before):
        torch.testing.assert_close(p.grad, expected)


def test_clipping_refuses_to_sum_from_what_was_written_to_since(backend):
    model, x = Net(), torch.randn(5, 3, 11)
    with per_sample.record(model, norms_only=True):
        model(x).square().sum().backward()
    before = [p.grad.clone() for p in adapters(model).values()]
    x.copy_(torch.randn(5, 3, 11))
    with pytest.raises(RuntimeError, match="written to since the backward pass: call clip_ before"):
        per_sample.clip_(model, 1.0)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(adapters(model).values(), before))


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norms_only", [False, True])
def test_a_training_step_reads_nothing_back(norms_only, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a value was read back from the device")

    model, x = Net("entry"), torch.randn(13, 11)
    starts = torch.tensor([0, 4, 4, 13], dtype=torch.int32)
    record = per_sample.record(model, starts, norms_only=norms_only)
    with record as recording, monkeypatch.context() as patched, _NoHostReads():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patched.setattr(torch.Tensor, name, read)
        model(x).square().sum().backward()
        for layer in (model.first, model.second):
            for call in recording.kept()[layer]["default"].calls:
                call.samples.spread(torch.ones(3))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_is_not_recorded_wrongly(fullgraph):
    model, x = Net(), torch.randn(4, 11)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    compiled(x).sum().backward()
    model.zero_grad()
    with pytest.raises(Exception, match="compiled model cannot be recorded"), per_sample.record(model):
        compiled(x).sum().backward()
    assert model.first.lora_A.grad is None
    with per_sample.record(model):
        model(x).square().sum().backward()
    all_close(recorded(model), one_by_one(model, x[:, None]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_ranges_that_are_set_before_the_backward_pass_are_the_next_ones(use_reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), torch.randn(1, 30, 11, requires_grad=True)
    starts, others = (torch.tensor([0, n, 30], dtype=torch.int32) for n in (10, 20))
    with per_sample.record(model, starts) as recording:
        loss = model(x).square().sum()
        recording.set_cu_seqlens(others)
        loss.backward()
    plain = Net()
    all_close(recorded(model), one_by_one(plain, [x[:, :10].detach(), x[:, 10:].detach()]))


def test_gradients_that_came_from_elsewhere():
    model, x = Net(), torch.randn(4, 11)
    with per_sample.record(model):
        model(x).square().sum().backward()
    norms, grads = per_sample.norms(model), recorded(model)
    other = Net()
    for name, p in adapters(other).items():
        p.grad_sample = grads[name]
    torch.testing.assert_close(per_sample.clip_(other, 1.0), norms)


def test_a_copy_made_inside_is_not_recorded():
    model, x = Net(), torch.randn(4, 11)
    with per_sample.record(model):
        twin = copy.deepcopy(model)
    with per_sample.record(twin):
        twin(x).square().sum().backward()
    all_close(recorded(twin), one_by_one(model, x[:, None]))


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(model, error, match, run):
    """`run` raises before any gradient is touched and leaves nothing behind."""
    with pytest.raises(error, match=match):
        run()
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    assert all("_recording" not in vars(m) for m in model.modules()) and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "starts, error, match",
    [
        (torch.tensor([1, 4], dtype=torch.int32), ValueError, "start at 0, got 1"),
        (
            torch.tensor([0, 3, 2, 4], dtype=torch.int32),
            ValueError,
            r"must not decrease, but \[1\] is 3 and \[2\] is 2",
        ),
        (torch.tensor([0, 3], dtype=torch.int32), ValueError, "ends at 3 and the input of layer 'first'"),
        (torch.tensor([0, 5], dtype=torch.int32), ValueError, "ends at 5 and the input of layer 'first'"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"must be \[b \+ 1\]"),
        (torch.tensor([[0, 4]], dtype=torch.int32), ValueError, r"must be \[b \+ 1\]"),
        (torch.tensor([0, 4]), TypeError, "int32"),
        ([0, 4], TypeError, "int32"),
    ],
)
def test_bad_cu_seqlens(starts, error, match):
    model = Net()

    def run():
        with per_sample.record(model, starts):
            model(torch.randn(4, 11)).sum().backward()

    refused(model, error, match, run)


def test_a_number_of_samples_that_changes_on_the_way():
    model = Net()

    def run(mix):
        with per_sample.record(model):
            model.second(mix(model.first(torch.randn(4, 3, 11)))).sum().backward()

    for mix in (lambda y: y.mean(0, keepdim=True), lambda y: y.flatten(0, 1), lambda y: y[:2]):
        refused(model, ValueError, "layer 'first' has inputs for 4 of them, layer 'second'", lambda mix=mix: run(mix))
    refused(model, ValueError, "has no leading dimension", lambda: run(lambda y: y.mean((0, 1))))


def test_shared_adapters_and_nested_records():
    model = Net()
    model.second = FusedALLoRALinear(9, 9, r=3)
    model.third = FusedALLoRALinear(9, 9, r=3)
    model.third.lora_A = model.second.lora_A

    def run():
        with per_sample.record(model):
            pass

    refused(model, ValueError, "layers 'second' and 'third' share an adapter", run)
    model = Net()

    def nested():
        with per_sample.record(model), per_sample.record(model.first):
            pass

    refused(model, RuntimeError, "recorded already", nested)
    with pytest.raises(ValueError, match="the model has no adapters"), per_sample.record(nn.Linear(2, 2)):
        pass


def test_clipping_refuses_what_it_would_leave_unclipped():
    model = nn.Sequential(Net(), nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match="no per-sample gradient"):
        per_sample.norms(model)
    with per_sample.record(model):
        model(torch.randn(4, 11)).sum().backward()
    before = model[0].first.lora_A.grad.clone()
    with pytest.raises(ValueError, match=r"'1.weight' has a gradient that was not recorded"):
        per_sample.clip_(model, 1.0)
    for bad in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match="max_norm"):
            per_sample.clip_(model, bad)
    assert torch.equal(model[0].first.lora_A.grad, before)


def test_layers_that_did_not_take_part():
    model = Net()
    with per_sample.record(model):
        model(torch.randn(4, 11)).sum().backward()
        model.first(torch.randn(3, 11)).sum().backward()
    with pytest.raises(RuntimeError, match="not every layer took part"):
        per_sample.norms(model)


@pytest.mark.parametrize("norms_only", [False, True])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_clipping_refuses_an_older_gradient_of_a_frozen_factor(frozen, norms_only):
    model = Net()
    model(torch.randn(4, 11)).sum().backward()
    factor = getattr(model.first, frozen)
    factor.requires_grad_(False)
    with per_sample.record(model, norms_only=norms_only):
        model(torch.randn(4, 11)).sum().backward()
    before = factor.grad.clone()
    with pytest.raises(ValueError, match=f"'first.{frozen}' has a gradient that was not recorded"):
        per_sample.clip_(model, 1.0)
    assert torch.equal(factor.grad, before)
    factor.grad = None
    per_sample.clip_(model, 1.0)
    assert factor.grad is None and model.second.lora_A.grad is not None


@pytest.mark.parametrize("norms_only", [False, True])
def test_another_factor_that_is_frozen_in_each_pass(norms_only):
    model = Net()
    with pytest.raises(ValueError, match="a factor of layer 'first' was frozen or freed"):  # noqa: SIM117
        with per_sample.record(model, norms_only=norms_only):
            model.first.lora_A.requires_grad_(False)
            model(torch.randn(4, 11)).sum().backward()
            model.first.lora_A.requires_grad_(True)
            model.first.lora_B.requires_grad_(False)
            model(torch.randn(4, 11)).sum().backward()


@pytest.mark.parametrize("norms_only", [False, True])
def test_a_factor_that_is_frozen_between_passes(norms_only):
    model = Net()
    with pytest.raises(ValueError, match="a factor of layer 'first' was frozen or freed"):  # noqa: SIM117
        with per_sample.record(model, norms_only=norms_only):
            model(torch.randn(4, 11)).sum().backward()
            model.first.lora_A.requires_grad_(False)
            model(torch.randn(4, 11)).sum().backward()
    assert not hasattr(model.second.lora_A, "grad_sample")


def test_layers_that_missed_as_many_samples_as_others():
    model = Net()
    with per_sample.record(model):
        for layer in (model.first, model.second):
            layer.enabled = False
            model(torch.randn(3, 11, requires_grad=True)).sum().backward()
            layer.enabled = True
    with pytest.raises(RuntimeError, match="'first' has gradients of 3 of 6 samples"):
        per_sample.norms(model)


def test_an_error_inside_leaves_no_record():
    model = Net()
    with pytest.raises(KeyError, match="stop"), per_sample.record(model):
        model(torch.randn(4, 11)).sum().backward()
        raise KeyError("stop")
    assert not hasattr(model.first.lora_A, "grad_sample") and "_recording" not in vars(model.first)


# --- what adds nothing to an adapter's gradient, and records that follow one another ---


@pytest.mark.parametrize("norms_only", [False, True])
def test_a_gradient_of_the_input_is_not_recorded(norms_only, backend):
    model, x = Net(), torch.randn(5, 3, 11, requires_grad=True)
    with per_sample.record(model, norms_only=norms_only):
        loss = model(x).square().sum()
        for retain_graph in (True, True):
            torch.autograd.grad(loss, x, retain_graph=retain_graph)
        loss.backward(inputs=[x], retain_graph=True)
        loss.backward()
    found = per_sample.norms(model)
    model.zero_grad()
    with per_sample.record(model, norms_only=norms_only):
        model(x.detach()).square().sum().backward()
    torch.testing.assert_close(found, per_sample.norms(model))


def test_adapters_asked_for_by_autograd_grad_are_recorded():
    model, x = Net(), torch.randn(5, 3, 11)
    with per_sample.record(model):
        sums = torch.autograd.grad(model(x).square().sum(), list(adapters(model).values()))
    for p, total in zip(adapters(model).values(), sums):
        torch.testing.assert_close(p.grad_sample.sum(0), total)


def test_records_that_followed_one_another_are_not_mixed():
    model, x = Net(), torch.randn(5, 3, 11)
    with per_sample.record(model):
        model(x).square().sum().backward()
    model.zero_grad()
    with per_sample.record(model.second):
        model(x).square().sum().backward()
    model.zero_grad()
    for call in (per_sample.norms, lambda m: per_sample.clip_(m, 1.0)):
        with pytest.raises(
            RuntimeError, match="'first' has gradients from a record that ended before that of layer 'second'"
        ):
            call(model)
    assert per_sample.norms(model.second).shape == (5,) and all(p.grad is None for p in adapters(model).values())
    with per_sample.record(model.first), per_sample.record(model.second):
        model(x).square().sum().backward()
    together = per_sample.norms(model)
    model.zero_grad()
    with per_sample.record(model):
        model(x).square().sum().backward()
    torch.testing.assert_close(together, per_sample.norms(model))


def test_two_losses_of_one_forward_pass_under_re_entrant_checkpointing():
    model, x = Net(), torch.randn(5, 3, 11, requires_grad=True)
    with per_sample.record(model):
        y = checkpoint(model, x, use_reentrant=True)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
    found = per_sample.norms(model)
    model.zero_grad()
    with per_sample.record(model):
        y = model(x)
        (y.square().sum() + y.sum()).backward()
    torch.testing.assert_close(found, per_sample.norms(model))
