"""A model without its adapters for a while: the frozen bits, no gradient to the adapters, and nothing of it stays."""

import contextlib
import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import bert, gpt2, llama, logits, pretend_to_train
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    FusedALLoRALinear,
    adapter_layers,
    adapter_parameters,
    apply_allora,
    disable_adapters,
    merge_adapter,
    per_sample,
    save_adapter,
    set_enabled,
    use_batch_invariant,
)
from allora_kernels.layer import switching


def adapted(build=llama, **arguments):
    model = build()
    apply_allora(model, r=3, **arguments)
    return pretend_to_train(model)


def states(model):
    return {layer.enabled for layer in adapter_layers(model).values()}


# --- what a disabled layer computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_a_disabled_model_has_the_bits_of_the_base(build):
    base, model = logits(build()), adapted(build)
    want = logits(model)
    assert not torch.allclose(want, base, atol=1e-3)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), want)
    set_enabled(model, False)
    assert torch.equal(logits(model), base)
    set_enabled(model, True)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [False, True])
def test_gradients_of_a_disabled_layer(shape, bias, conv):
    if conv:
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(6, 4)
        plain.bias = plain.bias if bias else nn.Parameter(torch.zeros(6))
    else:
        plain = nn.Linear(4, 6, bias=bias)
    layer = FusedALLoRALinear.from_linear(copy.deepcopy(plain), r=2)
    nn.init.normal_(layer.lora_B)
    layer.enabled = False
    x, other = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    y, want = layer(x), plain(other)
    assert torch.equal(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert all(p.grad is None for p in layer.parameters())


def test_a_disabled_layer_autocasts_and_complains_as_the_frozen_one():
    plain = nn.Linear(4, 6)
    layer = FusedALLoRALinear.from_linear(copy.deepcopy(plain), r=2)
    layer.enabled = False
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(x.double())


def test_a_disabled_layer_says_so():
    layer = FusedALLoRALinear(4, 6, r=2)
    assert "enabled" not in repr(layer) and "adapted_linear" in layer.explain().plan
    layer.enabled = False
    assert "enabled=False" in repr(layer)
    assert "disabled" in layer.explain().reason and layer.explain().plan == {"frozen_linear": "torch"}


def test_batch_invariance_holds_for_a_disabled_layer(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = nn.Linear(5, 6)
    layer = FusedALLoRALinear.from_linear(plain, r=2)
    nn.init.normal_(layer.lora_B)
    layer.enabled = False
    x = torch.randn(40, 5, requires_grad=True)
    with use_batch_invariant():
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y[:1], layer(x[:1]))
        assert "disabled" not in layer.explain().reason
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(40, 5))
    assert layer.lora_A.grad is None and layer.lora_B.grad is None


# --- switching ------------------------------------------------------------------------------------------------------


def test_contexts_nest_and_survive_exceptions():
    model = adapted()
    layers = list(adapter_layers(model).values())
    layers[0].enabled = False
    with disable_adapters(model):
        assert states(model) == {False}
        with pytest.raises(KeyError), disable_adapters(model):
            raise KeyError
        assert states(model) == {False}
        set_enabled(model, True)
    assert [layer.enabled for layer in layers] == [False] + [True] * (len(layers) - 1)


def test_bad_arguments_change_nothing():
    model = adapted()
    for value in (0, None, "no"):
        with pytest.raises(TypeError, match="enabled must be a bool"):
            set_enabled(model, value)
        with pytest.raises(TypeError, match="enabled must be a bool"):
            next(iter(adapter_layers(model).values())).enabled = value
    assert states(model) == {True}
    with pytest.raises(ValueError, match="no adapters"):
        set_enabled(llama(), False)
    with pytest.raises(ValueError, match="no adapters"), disable_adapters(llama()):
        pass


def test_wrappers_copies_and_files(tmp_path):
    model = adapted()
    with disable_adapters(nn.DataParallel(model)):
        assert states(model) == {False}
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        save_adapter(model, tmp_path)
    assert states(model) == {True}
    for twin in twins:
        assert states(twin) == {False}
        assert torch.equal(logits(twin), logits(llama()))
        set_enabled(twin, True)
        assert torch.equal(logits(twin), logits(model))


def test_a_disabled_adapter_is_not_merged():
    model = adapted()
    layer = adapter_layers(model)["model.layers.1.mlp.up_proj"]
    layer.enabled = False
    before = logits(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is disabled.*set_enabled"):
        merge_adapter(model)
    with pytest.raises(ValueError, match="disabled"):
        layer.merge()
    assert torch.equal(logits(model), before)


def test_a_compiled_model_is_switched():
    model = nn.Sequential(FusedALLoRALinear(4, 4, r=2), nn.ReLU())
    nn.init.normal_(model[0].lora_B)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with disable_adapters(compiled):
            y = compiled(x)
        assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias).relu())


# --- checkpointing --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three blocks of a frozen head, which has a gradient in any state; checkpointed or not."""

    def __init__(self, wrap=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Linear(5, 5)
        apply_allora(self, r=2, target_modules=r"blocks.*", modules_to_save=["head"])
        pretend_to_train(self)
        self.wrap = wrap or (lambda block, x: block(x))

    def forward(self, x):
        for block in self.blocks:
            x = self.wrap(block, x)
        return self.head(x)


def plain(block, x):
    return block(x)


def nested(use_reentrant):
    """A checkpoint in each block of another."""
    inner = functools.partial(checkpoint, use_reentrant=use_reentrant)

    def wrap(block, x):
        return checkpoint(lambda x: inner(block[2:], inner(block[:2], x)), x, use_reentrant=use_reentrant)

    return wrap


WRAPS = {
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "nested non-reentrant": nested(False),
}


def both_passes(model, disabled_first, backward):
    """Gradients after a pass with adapters and one without, whose backward passes run as `backward` says."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def disabled():
        with disable_adapters(model):
            return model(x * 2).square().sum()

    def enabled():
        return model(x).pow(3).sum()

    losses = [f() for f in ((disabled, enabled) if disabled_first else (enabled, disabled))]
    if backward == "sum":
        sum(losses).backward()
    elif backward == "inside":
        with disable_adapters(model):
            sum(losses).backward()
    else:
        for loss in losses if backward == "in order" else reversed(losses):
            loss.backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("backward", ["sum", "inside", "in order", "reversed"])
@pytest.mark.parametrize("disabled_first", [True, False])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_run_again_has_the_state_of_its_first_run(wrap, disabled_first, backward):
    want = both_passes(Net(), disabled_first, backward)
    found = both_passes(Net(WRAPS[wrap]), disabled_first, backward)
    assert len(want) == 1 + 6 * 2 + 2
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class Switching(nn.Module):
    """A block that switches its own adapters, between two calls of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = FusedALLoRALinear(5, 5, r=2)
        nn.init.normal_(self.layer.lora_B)

    def forward(self, x):
        x = self.layer(x).tanh()
        with disable_adapters(nn.ModuleList([self.layer])):
            x = self.layer(x).tanh()
        return self.layer(x).tanh()


@pytest.mark.parametrize("outer", [False, True], ids=["enabled", "disabled"])
@pytest.mark.parametrize("wrap", ["non-reentrant", "reentrant"])
def test_a_block_that_switches_adapters_itself(wrap, outer):
    grads = []
    for call in (plain, WRAPS[wrap]):
        block = Switching()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with disable_adapters(nn.ModuleList([block])) if outer else torch.enable_grad():
            y = call(block, x)
        y.square().sum().backward()
        assert block.layer.enabled
        block(x)
        grads.append([x.grad, block.layer.lora_A.grad, block.layer.lora_B.grad])
    for a, b in zip(*grads):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_nested_reentrant_checkpoints_that_switch_are_refused():
    block = Switching()
    inner = functools.partial(checkpoint, block, use_reentrant=True)
    x = torch.randn(4, 5, requires_grad=True)
    y = checkpoint(inner, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()
    plain_y = checkpoint(block, x, use_reentrant=True)
    plain_y.sum().backward()


def test_the_last_state_of_an_outer_checkpoint_that_switches_is_not_taken_for_the_inner_ones():
    layer = Switching().layer

    def outer(x):
        y = checkpoint(layer, x, use_reentrant=True)
        with disable_adapters(layer):
            return layer(y)

    y = checkpoint(outer, torch.randn(4, 5, requires_grad=True), use_reentrant=True)
    with disable_adapters(layer), pytest.raises(RuntimeError, match="cannot be told"):
        y.sum().backward()


@pytest.mark.parametrize("disabled", [True, False])
def test_nested_reentrant_checkpoints_are_run_again_in_the_state_that_is_set_or_refused(disabled):
    def state():
        return disable_adapters(model) if disabled else contextlib.nullcontext()

    grads = []
    for wrap in (None, nested(True)):
        model = Net(wrap)
        with disable_adapters(model):
            pass
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with state():
            model(x).square().sum().backward()
            pending = model(x).sum()
        grads.append([x.grad.clone(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) == 1 + (0 if disabled else 12) + 2
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    set_enabled(model, disabled)
    with pytest.raises(RuntimeError, match=r"cannot be told.*use_reentrant=False"):
        pending.backward()


@pytest.mark.parametrize("wrap", ["non-reentrant", "reentrant"])
def test_a_backward_pass_that_failed_does_not_confuse_the_next(wrap):
    def fail(_):
        raise KeyError("in the middle")

    want, model = Net(), Net(WRAPS[wrap])
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with disable_adapters(want):
        (expected,) = torch.autograd.grad(want(x).sum(), x)
    with disable_adapters(model):
        pending = model(x).sum()
    hooked = x * 2
    hooked.register_hook(fail)
    with pytest.raises(KeyError):
        model(hooked).sum().backward()
    x.grad = None
    pending.backward()
    torch.testing.assert_close(x.grad, expected)


def in_thread(run):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()


def step(model, x):
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("wrap", ["non-reentrant", "reentrant"])
def test_what_another_thread_switched_says_nothing_of_a_threads_own_passes(wrap):
    """The numbers of nodes are each thread's own."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    grads = []
    for call in (lambda run: run(), in_thread):
        model = Net(WRAPS[wrap])
        for _ in range(20):
            step(model, x)
        set_enabled(model, False)
        model.zero_grad()
        grads.append(call(lambda: step(model, x)))  # noqa: B023
    for a, b in zip(*grads):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)
    assert len([g for g in grads[1] if g is not None]) == 3


def test_a_pass_of_one_of_several_threads_is_refused_where_states_differ():
    model = Net(WRAPS["reentrant"])
    x = torch.randn(4, 5, requires_grad=True)
    with disable_adapters(model):
        pending = model(x).sum()
    in_thread(pending.backward)

    with disable_adapters(model):
        pending = model(x).sum()

    def other():
        model(x)
        with pytest.raises(RuntimeError, match="2 threads call one model whose adapters were switched"):
            in_thread(pending.backward)

    in_thread(other)


@pytest.mark.parametrize("wrap", ["non-reentrant", "reentrant"])
def test_a_call_in_another_thread_does_not_disturb_a_backward_pass(wrap):
    """In the middle of it, as a thread that computes something else may."""
    other = Net()
    grads = []
    for disturb in (lambda run: None, in_thread):
        block = Switching()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def disturbed(x, block=block, disturb=disturb):
            with disable_adapters(block):
                disturb(lambda: other(torch.ones(1, 5)))
                x = block.layer(x)
            return block(x)

        y = checkpoint(disturbed, x, use_reentrant=wrap == "reentrant")
        with disable_adapters(block):
            y.square().sum().backward()
        grads.append([x.grad, block.layer.lora_A.grad, block.layer.lora_B.grad])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_a_state_that_is_forgotten_is_an_error():
    model = Net(WRAPS["reentrant"])
    x = torch.randn(4, 5, requires_grad=True)
    with disable_adapters(model):
        loss = model(x).sum()
    for _ in range(switching._KEPT // 2):
        with disable_adapters(model):
            pass
    with pytest.raises(RuntimeError, match="forgotten"):
        loss.backward()
    model(x).sum().backward()


def test_transformers_checkpointing():
    grads = []
    ids = torch.arange(12).reshape(2, 6)
    for checkpointed in (False, True):
        model = adapted(modules_to_save=["lm_head"]).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with disable_adapters(model):
            loss = model(input_ids=ids).logits.square().sum()
        (loss + model(input_ids=ids).logits.pow(3).sum()).backward()
        grads.append([p.grad for p in adapter_parameters(model)] + [model.lm_head.weight.grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- per-sample gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("reference_grad", [False, True])
def test_a_reference_pass_is_not_counted(wrap, reference_grad):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def run(model, reference):
        with per_sample.record(model):
            if reference:
                with torch.set_grad_enabled(reference_grad), disable_adapters(model):
                    model(x[:2]).square().sum()
            model(x).square().sum().backward()
        return [p.grad_sample for p in adapter_parameters(model)]

    want = run(Net(), False)
    if wrap == "reentrant" and reference_grad:
        # Two forward passes wait for a backward pass, and which one runs again cannot be told: refused, as without switching.
        with pytest.raises(ValueError, match="use_reentrant=False"):
            run(Net(WRAPS[wrap]), True)
        return
    for a, b in zip(run(Net(wrap and WRAPS[wrap]), True), want):
        torch.testing.assert_close(a, b)


def test_a_layer_disabled_throughout_adds_nothing_to_the_norms():
    model = Net()
    layer = adapter_layers(model)["blocks.1.0"]
    layer.enabled = False
    x = torch.randn(4, 5)
    model.head.requires_grad_(False)
    with per_sample.record(model):
        model(x).square().sum().backward()
    assert not hasattr(layer.lora_A, "grad_sample") and layer.lora_A.grad is None
    got = per_sample.norms(model)
    squares = [p.grad_sample.flatten(1).square().sum(1) for p in adapter_parameters(model) if hasattr(p, "grad_sample")]
    assert len(squares) == 10
    torch.testing.assert_close(got, sum(squares).sqrt())
