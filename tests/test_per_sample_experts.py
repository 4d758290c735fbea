"""Per-sample gradients of the experts of a mixture, whose rows are routed away from the batch's order."""

import copy
import itertools

import pytest
import torch
from tiny_models import VOCAB, adapted_mixture, pretend_to_train, transformer
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from allora_kernels import apply_allora, per_sample, reference

IDS = torch.arange(4 * 6).reshape(4, 6) * 7 % VOCAB


def loss_of(model, ids=IDS):
    return model(input_ids=ids).logits.square().mean((1, 2)).sum()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model, samples, loss):
    """The gradient of each sample alone, by plain backward passes in double precision: {name: [b, *shape]}."""
    model = copy.deepcopy(model).double()
    found = {name: [] for name in trained(model)}
    for sample in samples:
        model.zero_grad()
        loss(model, sample).backward()
        for name, p in trained(model).items():
            found[name].append(p.grad)
    return {name: torch.stack(parts) for name, parts in found.items()}


def close(found, want):
    """To the rounding of sums whose terms are as large as the largest entry."""
    atol = 2e-5 * want.abs().max().item()
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=atol)


def assert_recorded(model, want):
    assert trained(model).keys() == want.keys()
    for name, p in trained(model).items():
        assert p.grad_sample.dtype == torch.promote_types(p.dtype, torch.float32)
        close(p.grad_sample, want[name])
        close(p.grad_sample.sum(0), p.grad)
    close(per_sample.norms(model), norms_of(want))


def norms_of(grads):
    return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3"])
@pytest.mark.parametrize("norm", ["row", "entry"])
def test_each_sample_has_its_own_gradient(backend, family, norm):
    if backend == "triton" and family in ("Mixtral", "DeepseekV3"):
        pytest.skip("two layouts are enough for the interpreter")
    model = adapted_mixture(family, norm=norm)
    with per_sample.record(model):
        loss_of(model).backward()
    assert_recorded(model, one_by_one(model, IDS[:, None], loss_of))
    per_sample.clear(model)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("norms_only", [False, True])
def test_clipping_takes_one_backward_pass(backend, norm, norms_only):
    model = adapted_mixture(norm=norm, target_modules=[])
    want = one_by_one(model, IDS[:, None], loss_of)
    norms = norms_of(want)
    max_norm = norms.median().item()
    with per_sample.record(model, norms_only=norms_only):
        loss_of(model).backward()
    assert any(hasattr(p, "grad_sample") for p in model.parameters()) != norms_only
    close(per_sample.clip_(model, max_norm), norms)
    weights = (max_norm / norms).clamp(max=1)
    assert 0 < (weights < 1).sum() < 4
    for name, p in trained(model).items():
        close(p.grad, torch.einsum("b,b...->...", weights, want[name]))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("norms_only", [False, True])
def test_checkpointing_does_not_count_twice(use_reentrant, norms_only):
    model = adapted_mixture()
    want = one_by_one(model, IDS[:, None], loss_of)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with per_sample.record(model, norms_only=norms_only):
        loss_of(model).backward()
    close(per_sample.norms(model), norms_of(want))
    if not norms_only:
        assert_recorded(model, want)


def test_several_checkpointed_forward_passes_of_one_backward_pass():
    model = adapted_mixture()
    want = one_by_one(model, IDS[:, None], loss_of)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with per_sample.record(model, samples=4):
        sum(loss_of(model, part) for part in IDS.split([1, 3])).backward()
    assert_recorded(model, want)


def test_micro_batches_follow_each_other_and_forward_passes_add_up():
    model = adapted_mixture()
    want = one_by_one(model, IDS[:, None], loss_of)
    with per_sample.record(model):
        for part in IDS.split([1, 3]):
            loss_of(model, part).backward()
    assert_recorded(model, want)
    with per_sample.record(model, samples=4):
        (loss_of(model) + loss_of(model)).backward()
    close(per_sample.norms(model), 2 * norms_of(want))


def test_a_shared_expert_that_sees_flattened_tokens_needs_their_ranges():
    model = transformer("Qwen2Moe", "ForCausalLM")
    apply_allora(model, r=2, experts=True)
    pretend_to_train(model)
    with per_sample.record(model), pytest.raises(ValueError, match=r"shared_expert.gate_proj' for 24"):
        loss_of(model)
    with per_sample.record(model, torch.arange(0, 25, 6, dtype=torch.int32)):
        loss_of(model).backward()
    assert_recorded(model, one_by_one(model, IDS[:, None], loss_of))


def test_noise_scale_is_that_of_the_samples():
    model = adapted_mixture()
    want = torch.cat([t.flatten(1) for t in one_by_one(model, IDS[:, None], loss_of).values()], 1)
    for norms_only in (False, True):
        with per_sample.record(model, norms_only=norms_only):
            loss_of(model).backward()
        close(per_sample.noise_scale(model).trace, want.var(0).sum())


# --- other batches -----------------------------------------------------------------------------------------------------


class Config:
    _experts_implementation = "eager"


@use_experts_implementation(has_gate=False)
class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = 4, nn.GELU()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(4, 10, 6)), nn.Parameter(torch.randn(4, 6, 10))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("the registry has another implementation")


class Block(nn.Module):
    """A layer, then experts; a token's values say which of them it goes to."""

    def __init__(self, dense=True, kept=None):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.experts, self.kept = nn.Linear(6, 6) if dense else nn.Identity(), Experts(Config()), kept

    def forward(self, x):
        rows = self.dense(x).flatten(0, -2)[: self.kept]
        weights, index = rows[:, :4].softmax(-1).topk(2)
        return self.experts(rows, index, weights)


def block(**arguments):
    model = Block(**arguments)
    apply_allora(model, r=2, experts=True, target_modules=["dense"] if arguments.get("dense", True) else [])
    return pretend_to_train(model)


def loss_of_block(model, x):
    return model(x.to(next(model.parameters()).dtype)).square().sum()


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norms_only", [False, True])
def test_packed_samples_one_of_them_empty(backend, norms_only):
    model, packed, starts = block(), X.reshape(1, 15, 6), [0, 4, 4, 15]
    want = one_by_one(model, [packed[:, a:b] for a, b in itertools.pairwise(starts)], loss_of_block)
    with per_sample.record(model, torch.tensor(starts, dtype=torch.int32), norms_only=norms_only):
        loss_of_block(model, packed).backward()
    close(per_sample.norms(model), norms_of(want))
    if not norms_only:
        assert_recorded(model, want)


def test_no_sample(backend):
    model = block()
    with per_sample.record(model):
        loss_of_block(model, X[:0]).backward()
    for p in trained(model).values():
        assert p.grad_sample.shape == (0, *p.shape) and not p.grad.any()


def test_a_time_major_model(backend):
    model = block()
    want = one_by_one(model, X[:, None], loss_of_block)
    with per_sample.record(model, batch_dim=1):
        loss_of_block(model, X.transpose(0, 1).contiguous()).backward()
    assert_recorded(model, want)


def test_rows_that_are_samples():
    model = block()
    want = one_by_one(model, X[0, :, None], loss_of_block)
    with per_sample.record(model):
        loss_of_block(model, X[0]).backward()
    assert_recorded(model, want)


def test_the_number_of_samples_is_that_of_the_model_s_inputs_where_only_experts_are_adapted():
    model = block(dense=False)
    want = one_by_one(model, X[:, None], loss_of_block)
    with per_sample.record(model):
        loss_of_block(model, X).backward()
    assert_recorded(model, want)


@pytest.mark.parametrize(
    "dense, arguments, shape",
    [(False, {"batch_dim": 1}, (3, 5, 6)), (False, {}, (15, 6)), (True, {"batch_dim": 2}, (3, 5, 2, 6))],
    ids=["time major, experts alone", "rows, experts alone", "samples in the middle"],
)
def test_tokens_of_which_samples_nothing_says(dense, arguments, shape):
    model = block(dense=dense)
    with per_sample.record(model, **arguments), pytest.raises(ValueError, match="which sample each token is of cannot"):
        model(torch.randn(shape))


def test_tokens_that_were_dropped_on_the_way():
    """Twelve tokens of 3 * 5 are a multiple of three samples, but not theirs."""
    model = block(kept=12)
    with per_sample.record(model), pytest.raises(ValueError, match="12 of them come to the experts"):
        model(X)


def test_inputs_that_disagree_on_the_length():
    class Other(Block):
        def forward(self, x, extra):
            return super().forward(x)

    model = Other(dense=False, kept=12)
    apply_allora(model, r=2, experts=True, target_modules=[])
    # The twelve tokens that are left fit the other input.
    with per_sample.record(model), pytest.raises(ValueError, match="which sample each token is of cannot"):
        model(X, torch.zeros(3, 4))


def test_cu_seqlens_of_another_length():
    model = block(dense=False)
    with (
        per_sample.record(model, torch.tensor([0, 3, 14], dtype=torch.int32)),
        pytest.raises(ValueError, match="it ends at 14"),
    ):
        model(X)


@pytest.mark.parametrize("starts", [None, [0, 4, 4, 15]])
def test_sorting_by_sample_reads_nothing_back(starts, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a value was read back from the device")

    model, index = block(dense=False), torch.randint(4, (15, 2))
    with per_sample.record(model, None if starts is None else torch.tensor(starts, dtype=torch.int32)) as recording:
        recording.enter_model(model, (X,), {})
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patched.setattr(torch.Tensor, name, read)
            order, ends, sinks = recording.routed(dict(model.experts.allora), index, 4)
            spread = sinks["up_proj"].samples.spread(torch.arange(3.0))
    lengths = torch.tensor([5, 5, 5] if starts is None else [4, 0, 11])
    experts, samples = index.reshape(-1)[order], torch.arange(3).repeat_interleave(lengths)[order // 2]
    assert torch.equal((experts * 3 + samples).sort().values, experts * 3 + samples)
    assert torch.equal(spread, samples.float()) and ends.tolist() == experts.bincount(minlength=4).cumsum(0).tolist()


class Listed(nn.Module):
    """Experts that are linear layers in a list: each gets the rows that `rows_of` chooses for it of all [b * T, K]."""

    def __init__(self, rows_of):
        super().__init__()
        self.experts, self.rows_of = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), rows_of

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return [expert(flat[self.rows_of(i)]) for i, expert in enumerate(self.experts)]


@pytest.mark.parametrize("starts", [None, [0, 1, 3]])
def test_rows_that_are_routed_to_a_list_of_experts_are_no_samples(starts):
    # As many rows for each expert as there are samples, or as cu_seqlens has.
    model = Listed(lambda i: torch.tensor([[0, 3, 5], [1, 2, 4]][i]))
    apply_allora(model, r=2, target_modules="all-linear")
    ranges = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    with per_sample.record(model, ranges), pytest.raises(ValueError, match=r"'experts\.0' is \[3, 4\].*batch_dim=0"):
        model(torch.randn(3, 2, 4))


def test_a_list_of_experts_that_see_every_sample():
    model = Listed(lambda i: slice(None))
    apply_allora(model, r=2, target_modules="all-linear")
    pretend_to_train(model)
    x = torch.randn(5, 4)

    def loss(model, x):
        return sum(y.square().sum() for y in model(x.to(model.experts[0].weight.dtype)))

    with per_sample.record(model, batch_dim=0):
        loss(model, x).backward()
    assert_recorded(model, one_by_one(model, x.split(1), loss))


def test_opacus_is_refused():
    pytest.importorskip("opacus")
    from allora_kernels.integrations.opacus import reasons_against

    listed = Listed(lambda i: slice(None))
    apply_allora(listed, r=2, target_modules="all-linear")
    assert any("sorted by expert and not by sample" in reason for reason in reasons_against(block().train()))
    assert any("'experts.1' is among experts" in reason for reason in reasons_against(listed.train()))
