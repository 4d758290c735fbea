"""Several adapters in one batch: each sample through its own, and what each adapter would get alone."""

import functools

import pytest
import torch
from foreign_layers import Foreign
from several_adapters import IDS, NAMES, RULES, Net, alone, gradients, plainly, several
from tiny_models import bert, gpt2, llama, photograph
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    WrappedALLoRALinear,
    adapter_rows,
    add_adapter,
    disable_adapters,
    remove_adapter,
    set_adapter,
    set_enabled,
)

# --- a mixed batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_each_sample_of_a_batch_goes_through_its_own_adapter(build):
    model = several(build)
    with torch.no_grad():
        want = {name: alone(model, name) for name in {*NAMES}}
        with adapter_rows(model, NAMES):
            y = model(input_ids=IDS).logits
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], want[name][i], rtol=1e-5, atol=1e-5)
        for other in want.keys() - {name}:
            assert not torch.allclose(y[i], want[other][i], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(alone(model, "default"), want["default"]), "nothing of the block stays"


def test_samples_without_an_adapter_have_the_bits_of_the_frozen_model():
    model = several()
    base = llama()
    with torch.no_grad():
        want = base(input_ids=IDS).logits
        with adapter_rows(model, NAMES):
            assert torch.equal(model(input_ids=IDS).logits[1], want[1])
        with adapter_rows(model, [None] * 6):
            assert torch.equal(model(input_ids=IDS).logits, want)


@pytest.mark.parametrize("norm", ["row", "matrix", "factor", "entry", "token", None])
def test_each_adapter_gets_the_gradients_that_it_would_get_alone(norm):
    """fp64: to rounding. fp32: an error of the mixed batch against fp64 is at most twice that of the adapter alone."""
    rules = {"default": {"r": 3, "norm": norm}, "other": {"r": 4, "norm": norm, "eta": 1.0}}
    names = ["other", None, "default", "other", "default", "default"]
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = several(rules=rules).to(dtype)
        with adapter_rows(model, names):
            model(input_ids=IDS).logits.square().mean(dim=(1, 2)).sum().backward()
        mixed = {name: gradients(model, name) for name in rules}
        single = {}
        for name in rules:
            model.zero_grad()
            rows = [i for i, n in enumerate(names) if n == name]
            alone(model, name, IDS[rows]).square().mean(dim=(1, 2)).sum().backward()
            single[name] = gradients(model, name)
        found[dtype] = mixed, single
    for name in rules:
        exact = found[torch.float64][1][name]
        for a, b in zip(found[torch.float64][0][name], exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        # Over all layers together: a single small tensor may be lucky alone.
        mixed, single = (
            sum(float(((a - b).norm() / b.norm()).square()) for a, b in zip(grads[name], exact, strict=True)) ** 0.5
            for grads in found[torch.float32]
        )
        assert 0 < mixed <= 2 * single


def test_an_adapter_that_no_sample_names_gets_no_gradient():
    model = several()
    with adapter_rows(model, ["wide"] * 5 + [None]):
        model(input_ids=IDS).logits.square().mean().backward()
    assert all(g is not None for g in gradients(model, "wide"))
    assert all(g is None for name in ("default", "plain") for g in gradients(model, name))


def test_padding_takes_no_part():
    """Samples of different lengths, padded to one: the gradients are those of each sample on its own, without padding."""
    lengths, names = [7, 3, 5], ["wide", "default", "wide"]
    model = several().double()
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    ids = torch.where(mask.bool(), IDS[:3], 0)
    with adapter_rows(model, names):
        y = model(input_ids=ids, attention_mask=mask).logits.square().mean(-1)
        (y * mask).sum().backward()
    mixed = {name: gradients(model, name) for name in set(names)}
    model.zero_grad()
    for i, (length, name) in enumerate(zip(lengths, names)):
        alone(model, name, IDS[i : i + 1, :length]).square().mean(-1).sum().backward()
    for name, grads in mixed.items():
        for a, b in zip(grads, gradients(model, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_accumulate_over_batches_with_other_names():
    model = several().double()
    for names in (NAMES, NAMES[::-1], ["plain"] * 6):
        with adapter_rows(model, names):
            model(input_ids=IDS).logits.square().mean(dim=(1, 2)).sum().backward()
    found = {name: gradients(model, name) for name in RULES}
    model.zero_grad()
    for names in (NAMES, NAMES[::-1], ["plain"] * 6):
        for i, name in enumerate(names):
            if name is not None:
                alone(model, name, IDS[i : i + 1]).square().mean().backward()
    for name in RULES:
        for a, b in zip(found[name], gradients(model, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- which rows are whose -------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Layers that see [B, T, K], [B * T, K] and [B, K]; and what else is asked for."""

    def __init__(self, reshape=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.flat, self.pooled = (nn.Linear(4, 4) for _ in range(3))
        self.reshape = reshape

    def forward(self, x):
        x = self.first(x).tanh()
        if self.reshape is not None:
            return self.flat(self.reshape(x))
        x = self.flat(x.reshape(-1, 4)).tanh().reshape(x.shape)
        return self.pooled(x[:, 0])


def flat_model(reshape=None):
    return several(lambda: Flat(reshape), {"a": {"r": 2}, "b": {"r": 3}})


def test_flattened_and_pooled_inputs():
    model = flat_model()
    x = torch.randn(3, 5, 4)
    names = ["b", "a", None]
    with adapter_rows(model, names):
        y = model(x)
    for i, name in enumerate(names):
        if name is None:
            with disable_adapters(model):
                want = model(x)
        else:
            set_adapter(model, name)
            want = model(x)
        torch.testing.assert_close(y[i], want[i])


@pytest.mark.parametrize(
    "reshape, shape",
    [
        (lambda x: x[:, :2].reshape(-1, 4), "[6, 4]"),
        (lambda x: x[:2], "[2, 5, 4]"),
        (lambda x: x.transpose(0, 1), "[5, 3, 4]"),
        (lambda x: x.reshape(1, -1, 4), "[1, 15, 4]"),
        (lambda x: x[0, 0], "[4]"),
        (lambda x: x.reshape(-1, 4)[:14], "[14, 4]"),
    ],
)
def test_rows_that_are_no_samples_are_refused_by_name(reshape, shape):
    model = flat_model(reshape)
    with adapter_rows(model, ["a", "b", None]), pytest.raises(ValueError, match="cannot be told") as caught:
        model(torch.randn(3, 5, 4))
    assert shape in str(caught.value) and "of flat is" in str(caught.value) and "3 samples" in str(caught.value)


def test_a_batch_of_another_size_is_refused():
    model = several()
    with adapter_rows(model, ["wide", "plain"]), pytest.raises(ValueError, match=r"2 samples.*\[6\]"):
        model(input_ids=IDS)


def test_the_experts_of_a_mixture_are_refused_even_where_the_number_of_rows_fits():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.experts[0](x.reshape(-1, 4)[[2, 0, 1]])

    model = several(Mixture, {"a": {"r": 2}, "b": {"r": 2}})
    with adapter_rows(model, ["a", "b", None]), pytest.raises(ValueError, match="routed to an expert"):
        model(torch.randn(3, 1, 4))


@pytest.mark.parametrize(
    "names, error, match",
    [
        (["wide", "plan"], ValueError, "no adapter 'plan'.*did you mean 'plain'"),
        ([], ValueError, "names is empty"),
        ("wide", TypeError, "must be a list"),
        ({"wide", "plain"}, TypeError, "must be a list"),
        (["wide", 1], TypeError, "name must be a str"),
    ],
)
def test_wrong_names(names, error, match):
    model = several()
    before = photograph(model)
    with pytest.raises(error, match=match), adapter_rows(model, names):
        pass
    assert photograph(model) == before


def test_what_takes_one_adapter_a_batch_is_refused():
    model = nn.Sequential(WrappedALLoRALinear(Foreign(torch.randn(4, 4), torch.randn(4)), r=2))
    add_adapter(model, "b")
    set_adapter(model, "b")
    with (
        pytest.raises(ValueError, match="0 is on Foreign, which takes one adapter a batch"),
        adapter_rows(model, ["b"]),
    ):
        pass
    with pytest.raises(ValueError, match=r"nn\.DataParallel"), adapter_rows(nn.DataParallel(several()), NAMES):
        pass


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_nest_and_survive_exceptions():
    model = several()
    with torch.no_grad():
        want = {name: alone(model, name) for name in RULES}
        with adapter_rows(model, ["wide"] * 6):
            with pytest.raises(KeyError, match="stop"), adapter_rows(model, ["plain"] * 6):
                torch.testing.assert_close(model(input_ids=IDS).logits, want["plain"])
                raise KeyError("stop")
            torch.testing.assert_close(model(input_ids=IDS).logits, want["wide"])
            with disable_adapters(model):
                assert torch.equal(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
            torch.testing.assert_close(model(input_ids=IDS).logits, want["wide"])
        torch.testing.assert_close(model(input_ids=IDS).logits, want["default"])
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "call", [lambda m: add_adapter(m, "new"), lambda m: set_adapter(m, "wide"), lambda m: remove_adapter(m, "wide")]
)
def test_adapters_are_not_changed_inside_a_block(call):
    model = several()
    before = photograph(model)
    with adapter_rows(model, NAMES), pytest.raises(RuntimeError, match="inside adapter_rows"):
        call(model)
    assert photograph(model) == before


def test_a_disabled_layer_stays_disabled():
    model = several()
    set_enabled(model, False)
    with torch.no_grad(), adapter_rows(model, NAMES):
        assert torch.equal(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)


# --- checkpointing --------------------------------------------------------------------------------------------------


WRAPS = {
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
}


def passes(wrap, backward):
    """Gradients after passes of several kinds, whose backward passes run in an order and a state of their own."""
    model = several(lambda: Net(wrap), {"a": {"r": 2}, "b": {"r": 3, "norm": "token"}})
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = []
    for names in (["a", "b", None], ["b", "b", "a"]):
        with adapter_rows(model, names):
            losses.append(model(x).square().sum())
    losses.append(model(x).pow(3).sum())
    set_adapter(model, "b")
    losses.append(model(2 * x).square().sum())
    with disable_adapters(model):
        losses.append(model(x).square().sum())
    if backward == "sum":
        sum(losses).backward()
    elif backward == "inside":
        with adapter_rows(model, ["a"] * 3):
            sum(losses).backward()
    else:
        for loss in losses if backward == "in order" else reversed(losses):
            loss.backward()
    return [x.grad, *gradients(model, "a"), *gradients(model, "b")]


@pytest.mark.parametrize("backward", ["sum", "inside", "in order", "reversed"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_run_again_has_the_rows_and_the_adapter_of_its_first_run(wrap, backward):
    want, found = (passes(how, backward) for how in (plainly, WRAPS[wrap]))
    assert len(want) == 1 + 2 * 12
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_gone_cannot_be_run_again():
    model = several(lambda: Net(WRAPS["non-reentrant"]), {"a": {"r": 2}, "b": {"r": 3}})
    with adapter_rows(model, ["b", "a", None]):
        y = model(torch.randn(3, 4, 5))
    remove_adapter(model, "b")
    with pytest.raises(RuntimeError, match=r"adapter 'b' is run again.*before remove_adapter"):
        y.sum().backward()


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_checkpointed_block_that_switches_adapters_itself(wrap):
    grads = []
    for call in (plainly, WRAPS[wrap]):
        model = several(lambda: Net(plainly), {"a": {"r": 2}, "b": {"r": 3}})

        def block(x, model=model):
            with adapter_rows(model, ["a", "b", None]):
                y = model(x)
            return model(y)

        start = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        call(block, start).square().sum().backward()
        grads.append([start.grad, *gradients(model, "a"), *gradients(model, "b")])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpointed_function_that_calls_set_adapter_is_refused():
    model = several(lambda: Net(plainly), {"a": {"r": 2}, "b": {"r": 3}})

    def function(x):
        set_adapter(model, "b")
        return model(x)

    y = checkpoint(function, torch.randn(3, 4, 5), use_reentrant=False)
    with pytest.raises(RuntimeError, match="set_adapter inside a backward pass"):
        y.sum().backward()
