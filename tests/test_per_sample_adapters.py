"""Per-sample gradients in a batch whose samples name their adapters: each adapter's are what its samples alone would give."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    disable_adapters,
    per_sample,
    reference,
    remove_adapter,
    set_adapter,
)

NAMES = ["b", None, "c", "b", "a", "a"]
X = torch.randn(6, 5, 11, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self, wrap=None):
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(11, 9), nn.Linear(9, 7), wrap

    def forward(self, x):
        x = self.first(x)
        x = x.tanh() if self.wrap is None else self.wrap(torch.tanh, x)
        return self.second(x) if self.wrap is None else self.wrap(self.second, x)


def several(norm="row", build=Net, **arguments):
    torch.manual_seed(0)
    model = build()
    apply_allora(model, r=3, norm=norm, eta=1.5, adapter_name="a", **arguments)
    add_adapter(model, "b", r=2, norm=norm, eta=0.7)
    add_adapter(model, "c", r=5, norm="matrix")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


def close(found, want):
    """To the rounding of sums whose terms are as large as the largest entry."""
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * want.abs().max().item())


def loss_of(y):
    return y.square().sum()


def alone(model, name, x):
    """(`grad_sample`s, norms) of an adapter for samples of its own."""
    model = copy.deepcopy(model)
    set_adapter(model, name)
    with per_sample.record(model):
        loss_of(model(x)).backward()
    return [p.grad_sample for p in adapter_parameters(model, name)], per_sample.norms(model)


def expected_of(model, names, x):
    """What `alone` says of every adapter of a batch, the norms as the samples lie in it."""
    grads, norms = {}, torch.zeros(len(names))
    for name in dict.fromkeys(filter(None, names)):
        places = [i for i, n in enumerate(names) if n == name]
        grads[name], norms[places] = alone(model, name, x[places])
    return grads, norms


def assert_recorded(model, grads, norms):
    for name, want in grads.items():
        for p, t in zip(adapter_parameters(model, name), want, strict=True):
            close(p.grad_sample, t)
    close(per_sample.norms(model), norms)


@pytest.mark.parametrize("outside", ["record", "rows"])
@pytest.mark.parametrize("norm", reference.NORMS)
def test_each_adapter_gets_the_gradients_of_its_own_samples(backend, norm, outside):
    model = several(norm)
    blocks = [per_sample.record(model), adapter_rows(model, NAMES)]
    with contextlib.ExitStack() as stack:
        for block in blocks if outside == "record" else reversed(blocks):
            stack.enter_context(block)
        loss_of(model(X)).backward()
    assert_recorded(model, *expected_of(model, NAMES, X))
    assert adapter_parameters(model, "b")[0].grad_sample.shape == (2, 2, 11)
    for p in adapter_parameters(model):
        close(p.grad_sample.sum(0), p.grad)
    per_sample.clear(model)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_the_gradient_of_the_input_and_the_sums_are_those_without_a_record(backend):
    model, found = several(), []
    for block in (contextlib.nullcontext(), per_sample.record(model)):
        x = X.clone().requires_grad_()
        model.zero_grad()
        with block, adapter_rows(model, NAMES):
            loss_of(model(x)).backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, recorded in zip(*found, strict=True):
        close(recorded, plain)


@pytest.mark.parametrize("norms_only", [False, True])
def test_clipping_bounds_each_sample_whatever_its_adapter(backend, norms_only):
    model = several()
    grads, norms = expected_of(model, NAMES, X)
    max_norm = norms[norms > 0].median().item()
    with per_sample.record(model, norms_only=norms_only), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
    assert hasattr(model.first.lora_A, "grad_sample") != norms_only
    close(per_sample.clip_(model, max_norm), norms)
    weights = (max_norm / norms).clamp(max=1)
    assert (weights[norms > 0] < 1).any()
    for name, want in grads.items():
        own = weights[[i for i, n in enumerate(NAMES) if n == name]]
        for p, t in zip(adapter_parameters(model, name), want, strict=True):
            close(p.grad, torch.einsum("b,b...->...", own, t))
    close(per_sample.norms(model), norms)


@pytest.mark.parametrize("norms_only", [False, True])
def test_micro_batches_with_other_names_follow_each_other(norms_only):
    model, parts = several(), [slice(0, 3), slice(3, 4), slice(4, 6)]
    grads, norms = expected_of(model, NAMES, X)
    with per_sample.record(model, norms_only=norms_only):
        for part in parts:
            with adapter_rows(model, NAMES[part]):
                loss_of(model(X[part])).backward()
    if norms_only:
        close(per_sample.norms(model), norms)
    else:
        assert_recorded(model, grads, norms)


def test_a_mixed_micro_batch_after_one_of_the_active_adapter():
    model = several()
    with per_sample.record(model):
        loss_of(model(X[:2])).backward()
        with adapter_rows(model, ["c", "a"]):
            loss_of(model(X[2:4])).backward()
    assert_recorded(model, *expected_of(model, ["a", "a", "c", "a"], X[:4]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_count_twice(use_reentrant):
    def wrap(function, x):
        return checkpoint(function, x, use_reentrant=use_reentrant)

    model = several(build=lambda: Net(wrap))
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
    model.wrap = None
    assert_recorded(model, *expected_of(model, NAMES, X))


class Flattened(Net):
    """Works on [B * T, K] inside."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).reshape(*x.shape[:2], -1)


def test_rows_that_lie_flattened():
    model, plain = several(build=Flattened), several()
    plain.load_state_dict(model.state_dict())
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
    assert_recorded(model, *expected_of(plain, NAMES, X))


def test_halves_that_are_frozen():
    model = several()
    for p in (model.first.adapters["a"].lora_A, model.second.adapters["b"].lora_B):
        p.requires_grad_(False)
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
    assert not hasattr(model.first.adapters["a"].lora_A, "grad_sample")
    whole = several()
    for name, want in expected_of(whole, NAMES, X)[0].items():
        for p, t in zip(adapter_parameters(whole, name), want, strict=True):
            p.grad_sample = t
    for p, want in zip(model.parameters(), whole.parameters(), strict=True):
        if p.requires_grad:
            close(p.grad_sample, want.grad_sample)


def test_an_adapter_without_samples_and_disabled_ones():
    model = several()
    with per_sample.record(model), adapter_rows(model, ["b", "b"]), disable_adapters(model.second):
        loss_of(model(X[:2])).backward()
    assert not hasattr(model.first.adapters["a"].lora_A, "grad_sample")
    assert not hasattr(model.second.adapters["b"].lora_A, "grad_sample")
    assert per_sample.norms(model).shape == (2,)


def test_16_bits_keep_their_samples_in_float32():
    model = several().to(torch.bfloat16)
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X.bfloat16()).float()).backward()
    for p in adapter_parameters(model):
        assert p.grad_sample.dtype == torch.float32 and p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad_sample.sum(0).bfloat16(), p.grad)
    assert torch.equal(adapter_parameters(model, "a")[0].grad_sample, alone(model, "a", X[[4, 5]].bfloat16())[0][0])


def test_one_backward_pass_of_several_forward_passes():
    model = several()
    with per_sample.record(model, samples=6):
        losses = []
        for part in (slice(0, 2), slice(2, 6)):
            with adapter_rows(model, NAMES[part]):
                losses.append(loss_of(model(X[part])))
        sum(losses).backward()
    assert_recorded(model, *expected_of(model, NAMES, X))
    once = per_sample.norms(model)
    with per_sample.record(model, samples=6), adapter_rows(model, NAMES):
        (loss_of(model(X)) + loss_of(model(X))).backward()
    close(per_sample.norms(model), 2 * once)
    # The same samples, each through another adapter the second time, which has a gradient of its own.
    with per_sample.record(model, samples=2):
        with adapter_rows(model, ["a", "a"]):
            first = loss_of(model(X[:2]))
        with adapter_rows(model, ["b", "b"]):
            (first + loss_of(model(X[:2]))).backward()
    squares = [alone(model, name, X[:2])[1].square() for name in "ab"]
    close(per_sample.norms(model), sum(squares).sqrt())


def test_micro_batches_that_different_layers_missed():
    """An adapter is frozen in one layer, the other in the other: samples keep their places."""
    model = several()
    for adapter in (model.first.adapters["a"], model.second.adapters["b"]):
        adapter.lora_A.requires_grad_(False)
        adapter.lora_B.requires_grad_(False)
    found = []
    for names in ("a", "b"):
        with per_sample.record(model), adapter_rows(model, [names] * 3):
            loss_of(model(X[:3])).backward()
        found.append(per_sample.norms(model))
    with per_sample.record(model):
        for names in ("a", "b"):
            with adapter_rows(model, [names] * 3):
                loss_of(model(X[:3])).backward()
    close(per_sample.norms(model), torch.cat(found))


def test_the_same_samples_named_and_by_the_active_adapter():
    model = several()
    want, _ = alone(model, "a", X[:2])
    with per_sample.record(model, samples=2):
        with adapter_rows(model, ["a", "a"]):
            loss = loss_of(model(X[:2]))
        (loss + loss_of(model(X[:2]))).backward()
    for p, t in zip(adapter_parameters(model, "a"), want, strict=True):
        close(p.grad_sample, 2 * t)


def test_reference_samples_alone_without_gradients():
    model = several()
    with per_sample.record(model):
        with torch.no_grad(), adapter_rows(model, [None] * 6):
            model(X)
        with adapter_rows(model, NAMES):
            loss_of(model(X)).backward()
    assert_recorded(model, *expected_of(model, NAMES, X))


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"cu_seqlens": torch.tensor([0, 15, 30], dtype=torch.int32)}, {"batch_dim": 1}],
    ids=["cu_seqlens", "batch_dim"],
)
def test_samples_of_another_kind(arguments):
    model = several()
    with (
        per_sample.record(model, **arguments),
        adapter_rows(model, NAMES),
        pytest.raises(ValueError, match="record without cu_seqlens and batch_dim"),
    ):
        model(X)


def test_samples_that_go_other_ways_the_second_time():
    model = several()
    with pytest.raises(ValueError, match="with other adapters for them"), per_sample.record(model, samples=2):
        losses = []
        for names in (["a", "b"], ["b", "a"]):
            with adapter_rows(model, names):
                losses.append(loss_of(model(X[:2])))
        sum(losses).backward()


def test_a_batch_that_a_record_cannot_see():
    model = several()
    with (
        per_sample.record(model),
        adapter_rows(model, [None] * 6),
        pytest.raises(ValueError, match="no sample of this batch goes through an adapter"),
    ):
        model(X)


def test_noise_is_of_one_adapter():
    model = several()
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
    with pytest.raises(ValueError, match="adapter_rows gave each its own"):
        per_sample.noise_scale(model)
    with per_sample.record(model), adapter_rows(model, ["b"] * 6):
        loss_of(model(X)).backward()
    assert per_sample.noise_scale(model).trace > 0


def test_adapters_are_not_exchanged_under_a_record():
    model = several()
    calls = (
        lambda: add_adapter(model, "d"),
        lambda: set_adapter(model, "b"),
        lambda: remove_adapter(model, "b"),
    )
    with per_sample.record(model), adapter_rows(model, NAMES):
        loss_of(model(X)).backward()
        for call in calls:
            with pytest.raises(RuntimeError, match=r"inside per_sample.record, whose gradients are by adapter"):
                call()
    remove_adapter(model, "b")
    with pytest.raises(RuntimeError, match="adapter 'b' were recorded, and it was removed since"):
        per_sample.norms(model)
    per_sample.clear(model)
    with pytest.raises(RuntimeError, match="no per-sample gradient was recorded"):
        per_sample.norms(model)


def test_what_was_recorded_stays_with_its_adapter():
    model = several()
    for norms_only in (False, True):
        model.zero_grad()
        set_adapter(model, "b")
        with per_sample.record(model, norms_only=norms_only):
            loss_of(model(X)).backward()
        norms, want = per_sample.norms(model), adapter_parameters(model, "b")[0].grad.clone()
        set_adapter(model, "a")
        assert torch.equal(per_sample.clip_(model, norms.max().item()), norms)
        close(adapter_parameters(model, "b")[0].grad, want)
        assert all(p.grad is None for p in adapter_parameters(model, "a"))


def test_clipping_refuses_gradients_of_adapters_that_were_not_recorded():
    model = several()
    with adapter_rows(model, ["c"] * 6):
        loss_of(model(X)).backward()
    with per_sample.record(model), adapter_rows(model, ["a", "b"] * 3):
        loss_of(model(X)).backward()
    with pytest.raises(ValueError, match=r"adapters\.c\.lora_A' has a gradient that was not recorded"):
        per_sample.clip_(model, 1.0)


@pytest.mark.parametrize("norms_only", [False, True])
def test_another_adapter_of_the_same_name_gets_nothing_of_the_record(norms_only):
    model = several()
    with per_sample.record(model, norms_only=norms_only), adapter_rows(model, ["a", "b"]):
        loss_of(model(X[:2])).backward()
    remove_adapter(model, "b")
    add_adapter(model, "b", r=2)
    for call in (per_sample.norms, lambda model: per_sample.clip_(model, 1.0)):
        with pytest.raises(RuntimeError, match="adapter 'b' were recorded, and it was removed since"):
            call(model)
    assert all(p.grad is None for p in adapter_parameters(model, "b"))


def test_an_adapter_that_is_frozen_in_one_layer():
    model, whole = several(), several()
    for p in (model.second.adapters["a"].lora_A, model.second.adapters["a"].lora_B):
        p.requires_grad_(False)
    for net in (model, whole):
        with per_sample.record(net), adapter_rows(net, ["a"] * 6):
            loss_of(net(X)).backward()
    assert not hasattr(model.second.adapters["a"].lora_A, "grad_sample")
    for p, want in zip(adapter_parameters(model.first, "a"), adapter_parameters(whole.first, "a"), strict=True):
        close(p.grad_sample, want.grad_sample)
