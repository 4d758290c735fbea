"""Adapters on the experts of transformers' mixtures, by way of its registry of experts functions."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from tiny_models import (
    MIXTURES,
    VOCAB,
    adapted_mixture,
    logits,
    mixture,
    photograph,
    pretend_to_train,
    shared_mixture,
    tied_mixture,
)
from torch import nn
from transformers.integrations.moe import use_experts_implementation
from two_layers import assert_same

from allora_kernels import (
    FusedALLoRALinear,
    adapter_layers,
    adapter_parameters,
    apply_allora,
    disable_adapters,
    explain,
    merge_adapter,
    set_enabled,
    unmerge_adapter,
    use_batch_invariant,
)
from allora_kernels.reference import allora_linear

IDS = torch.arange(14).reshape(2, 7) * 3 % VOCAB
FAMILIES = list(MIXTURES)


def experts_of(model):
    return [m for name, m in model.named_modules() if name.endswith(".experts")]


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what is adapted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_get_adapters_and_nothing_else_trains(family):
    model = mixture(family)
    report = apply_allora(model, r=3, experts=True)
    layers = [0, 1] if family != "DeepseekV3" else [1]
    names = {f"model.layers.{i}.mlp.experts.{p}" for i in layers for p in ("gate_up_proj", "down_proj")}
    assert report.experts.keys() == names and report.adapted.keys() > names
    assert set(report.experts.values()) == {experts_of(model)[0].num_experts}
    assert not any("experts" in name for name in report.skipped)
    assert "experts of [" in str(report)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)
    assert not any("gate." in name or "router" in name for name in trained)
    assert "model.layers.1.mlp.experts.allora.down_proj.lora_A" in trained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_a_disabled_one_not_a_bit(family, backend):
    model = mixture(family)
    want = logits(model)
    apply_allora(model, r=3, experts=True)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    pretend_to_train(model)
    assert (logits(model) - want).abs().max() > 1e-2
    with disable_adapters(model):
        assert torch.equal(logits(model), want)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        plain = mixture(family)
        plain.set_experts_implementation(implementation)
        with disable_adapters(model):
            assert torch.equal(logits(model), logits(plain))


def test_some_parameters_and_ranks_and_exclusions():
    report = apply_allora(
        mixture("Mixtral"), r=2, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"]
    )
    assert report.adapted == {"model.layers.1.mlp.experts.down_proj": (16, 32, 2)}
    report = apply_allora(
        mixture("Mixtral"),
        r=2,
        target_modules=["q_proj"],
        target_parameters=["gate_up_proj"],
        rank_pattern={r".*0.*gate_up_proj": 5},
    )
    assert len(report.adapted) == 4 and report.adapted["model.layers.0.mlp.experts.gate_up_proj"] == (64, 16, 5)
    report = apply_allora(mixture("Mixtral"), r=2, experts=True, exclude_modules=["layers.0.mlp.experts"])
    assert report.experts.keys() == {f"model.layers.1.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    assert report.skipped["model.layers.0.mlp.experts"] == "in exclude_modules"


def test_experts_shared_between_layers_go_by_each_of_their_names():
    first = {f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    report = apply_allora(
        shared_mixture(), r=2, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj", "gate_up_proj"]
    )
    assert report.adapted.keys() == first
    report = apply_allora(shared_mixture(), r=2, experts=True, exclude_modules=["layers.1.mlp.experts.gate_up_proj"])
    assert report.experts.keys() == {"model.layers.0.mlp.experts.down_proj"}


def test_a_parameter_shared_between_experts_goes_by_each_of_its_names():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = apply_allora(tied_mixture(), r=2, experts=True, exclude_modules=["layers.1.mlp.experts.down_proj"])
        assert not caught and "model.layers.0.mlp.experts.down_proj" in report.experts and len(report.experts) == 3
        apply_allora(tied_mixture(), r=2, target_modules=["q_proj", "layers.1.mlp.experts.down_proj"])
        assert "it is a 3-D parameter (model.layers.1.mlp.experts.down_proj)" in str(caught[0].message)


def test_16_bit_experts_get_float32_adapters():
    model = mixture("Qwen3Moe").to(torch.bfloat16)
    apply_allora(model, r=2, experts=True)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model))


def test_an_adapter_starts_as_pefts_does():
    model = mixture("Olmoe", hidden_size=64)
    apply_allora(model, r=8, experts=True)
    adapter = experts_of(model)[0].allora["gate_up_proj"]
    bound = (1 / adapter.in_features) ** 0.5
    assert 0.95 * bound < adapter.lora_A.abs().max() <= bound and not adapter.lora_B.any()


def test_a_router_that_is_a_linear_layer_stays_frozen():
    model = Block(nn.Linear(6, 4))
    report = apply_allora(model, r=2, experts=True)
    assert "router" in report.skipped["router"] and type(model.router) is nn.Linear
    assert isinstance(model.dense, FusedALLoRALinear)


def test_a_router_of_several_linear_layers_stays_frozen():
    """As Zaya's, whose last layer has one output more than there are experts."""
    model = Block(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)))
    report = apply_allora(model, r=2, experts=True)
    assert {"router.0", "router.2"} == report.skipped.keys() and "dense" in report.adapted


# --- what it computes --------------------------------------------------------------------------------------------------


# Older transformers have no such experts.
HAS_NORM = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
with_a_norm = {"has_post_expert_norm": True} if HAS_NORM else {}


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True, **with_a_norm)
class PlainExperts(nn.Module):
    """Not gated, transposed, with biases and a norm after each expert."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = 4, nn.GELU()
        self.up_proj = nn.Parameter(torch.randn(4, 6, 10))
        self.up_proj_bias = nn.Parameter(torch.randn(4, 10))
        self.down_proj = nn.Parameter(torch.randn(4, 10, 6))
        self.down_proj_bias = nn.Parameter(torch.randn(4, 6))
        self.post_expert_norm = nn.LayerNorm(6) if HAS_NORM else nn.Identity()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("the registry has another implementation")


class Config:
    _experts_implementation = "batched_mm"


class Block(nn.Module):
    def __init__(self, router=None):
        super().__init__()
        torch.manual_seed(0)
        self.router = router
        self.dense = nn.Linear(6, 6)
        self.experts = PlainExperts(Config())

    def forward(self, x, index, weights):
        return self.experts(self.dense(x), index, weights)


def by_hand(block, x, index, weights):
    """`PlainExperts` token by token, by the reference's linear layer."""
    experts, adapters = block.experts, block.experts.allora

    def product(x, name, e):
        a, adapter = getattr(experts, name), adapters[name]
        return allora_linear(
            x, a[e].mT, getattr(experts, f"{name}_bias")[e], adapter.lora_A[e], adapter.lora_B[e], eta=2.0, norm=None
        )

    rows = []
    for x_t, index_t, weights_t in zip(block.dense(x), index, weights):
        row = 0
        for e, weight in zip(index_t.tolist(), weights_t):
            h = experts.act_fn(product(x_t[None], "up_proj", e))
            row = row + weight * experts.post_expert_norm(product(h, "down_proj", e))[0]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 3)])
def test_values_and_gradients_token_by_token(backend, chosen):
    """Also where experts get no token. Nothing of the routing is ours, but its weights' gradient passes through us."""
    block = Block()
    apply_allora(block, r=2, experts=True, target_modules=[], norm=None)
    pretend_to_train(block)
    x = torch.randn(9, 6, requires_grad=True)
    index = torch.tensor(chosen)[torch.rand(9, len(chosen)).argsort(1)[:, :2]]
    weights = torch.rand(9, 2, requires_grad=True)
    inputs, results = (x, weights, *adapter_parameters(block)), []
    for forward in (block, lambda *arguments: by_hand(block, *arguments)):
        y = forward(x, index, weights)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    for found, want in zip(*results):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    # The experts' own implementation, for the frozen part.
    with disable_adapters(block):
        torch.testing.assert_close(block(x, index, weights).shape, y.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_what_adapted_computes_and_merging_can_be_taken_back(family):
    model = adapted_mixture(family)
    before, want, base = photograph(model), logits(model), mixture(family)
    merge_adapter(model, keep=True)
    assert not adapter_layers(model) and model.state_dict().keys() == base.state_dict().keys()
    assert all(m.config is model.config for m in experts_of(model))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    unmerge_adapter(model)
    assert photograph(model) == before and torch.equal(logits(model), want)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_adapter(model)


def test_merging_experts_that_share_their_parameters_is_warned_of():
    model = tied_mixture()
    model.config.tie_word_embeddings = True
    apply_allora(model, r=3, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    want = logits(pretend_to_train(model))
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.experts\.down_proj shared its weight .* set it False first"):
        merge_adapter(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_unmerging_after_a_cast_is_refused():
    model = adapted_mixture()
    merge_adapter(model, keep=True)
    model.double()
    with pytest.raises(ValueError, match=r"was torch\.float32 when it was merged and is torch\.float64 now"):
        unmerge_adapter(model)
    assert not adapter_layers(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["row", "token"])
def test_it_trains(family, norm, backend):
    if backend == "triton" and (family not in ("Qwen3Moe", "GptOss") or norm == "token"):
        pytest.skip("two layouts and one rule are enough for the interpreter")
    model = mixture(family)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    apply_allora(model, r=3, experts=True, target_modules=[], norm=norm)
    model.train()
    optimizer = torch.optim.Adam(adapter_parameters(model), lr=0.05)
    losses = []
    for _ in range(3 if backend == "triton" else 25):
        losses.append(loss_of(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # The small, frozen head bounds what is in reach.
    assert losses[-1] < losses[0] - (0 if backend == "triton" else 0.15)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert all(p.abs().max() > 0 for p in adapter_parameters(model))


def test_every_step_has_the_same_bits_and_both_backends_agree(monkeypatch):
    model = adapted_mixture(norm="factor")
    first = gradients(model)
    assert_same(gradients(model), first, rtol=0, atol=0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = gradients(model)
    assert_same(kernels, first, rtol=1e-4, atol=1e-6)
    assert_same(gradients(model), kernels, rtol=0, atol=0)


def test_batch_invariance_reaches_experts_that_are_switched_off(monkeypatch):
    """Their own implementation knows nothing of it, so the kernels run with a zero factor."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    block = Block()
    apply_allora(block, r=2, experts=True, target_modules=[])
    pretend_to_train(block)
    x, index, weights = torch.randn(9, 6), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    with disable_adapters(block):
        plain = block(x, index, weights)
    use_batch_invariant(True)
    try:
        for adapter in block.experts.allora.values():
            whole = block(x, index, weights)
            assert torch.equal(block(x[2:5], index[2:5], weights[2:5]), whole[2:5])
            adapter.enabled = False
        monkeypatch.setattr(Config, "_experts_implementation", "eager")  # Which fails if it is run.
        torch.testing.assert_close(block(x, index, weights), plain, rtol=1e-5, atol=1e-5)
    finally:
        use_batch_invariant(False)


# --- living with the rest of the world ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_their_own(copied):
    model = adapted_mixture()
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model))
    assert all(m.config.former is twin.config for m in experts_of(twin))
    with torch.no_grad():
        experts_of(twin)[0].allora["down_proj"].lora_B.zero_()
    assert not torch.equal(logits(twin), logits(model))
    merge_adapter(twin)
    assert adapter_layers(model) and all(m.config is twin.config for m in experts_of(twin))


def test_a_pickle_is_read_by_a_process_that_has_adapted_nothing(tmp_path):
    import subprocess
    import sys

    model = adapted_mixture()
    torch.save((model, logits(model)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, want = torch.load(sys.argv[1], weights_only=False); "
        "ids = torch.arange(14).reshape(2, 7) * 5 % 40; assert torch.equal(model(input_ids=ids).logits, want)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_s_config_says_nothing_of_it(tmp_path):
    model = adapted_mixture()
    assert model.config._experts_implementation == "grouped_mm" and model.get_experts_implementation() == {
        "": "grouped_mm"
    }
    model.config.save_pretrained(tmp_path)
    assert "allora" not in (tmp_path / "config.json").read_text()
    fresh = mixture("Qwen3Moe")
    assert torch.equal(logits(fresh), logits(mixture("Qwen3Moe")))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_switch_in_between(reentrant):
    model = adapted_mixture().train()
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = loss_of(model)
    with disable_adapters(model), torch.no_grad():
        loss_of(model)
    model.zero_grad()
    set_enabled(model, False)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, want, rtol=0, atol=0)


def test_torch_compile(backend):
    # One layer: a compilation takes seconds.
    model = mixture("Qwen3Moe", num_hidden_layers=1)
    apply_allora(model, r=3, experts=True)
    pretend_to_train(model)
    want = gradients(model)
    torch.compiler.reset()
    step = torch.compile(loss_of, backend="aot_eager", fullgraph=backend == "triton")
    model.zero_grad()
    step(model).backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, rtol=1e-4, atol=1e-6)


def test_autocast_and_generation():
    model = adapted_mixture()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in adapter_parameters(model))
    made = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    merge_adapter(model)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=4, do_sample=False), made)


def test_it_explains_and_describes_itself():
    model = adapted_mixture()
    found = explain(model).layers["model.layers.0.mlp.experts.down_proj"]
    assert found.shape == (4, 16, 12) and found.r == 3
    assert "[4, 16, 12], r=3" in str(explain(model))
    assert "experts=4, in_features=12, out_features=16, r=3" in repr(model)
    set_enabled(model, False)
    assert "disabled" in explain(model).layers["model.layers.0.mlp.experts.down_proj"].reason
