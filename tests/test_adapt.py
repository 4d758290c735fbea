"""Which layers get an adapter, that the rest of the model is left alone, and that merging computes the same."""

import copy
import pickle
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tiny_models import bert, gpt2, llama, logits, photograph, pretend_to_train, transformer
from torch import nn
from transformers.pytorch_utils import Conv1D

from allora_kernels import (
    FusedALLoRALinear,
    adapter_layers,
    adapter_parameters,
    apply_allora,
    disable_adapters,
    merge_adapter,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.out(torch.tanh(self.q(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(10).reshape(2, 5)


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, head, task",
    [
        ("Bert", "ForSequenceClassification", TaskType.SEQ_CLS),
        ("Bert", "ForMaskedLM", None),
        ("Bert", "Model", None),
        ("Roberta", "ForSequenceClassification", TaskType.SEQ_CLS),
        ("Llama", "ForCausalLM", TaskType.CAUSAL_LM),
        ("Llama", "ForSequenceClassification", TaskType.SEQ_CLS),
        ("GPT2", "LMHeadModel", TaskType.CAUSAL_LM),
        ("GPT2", "ForSequenceClassification", TaskType.SEQ_CLS),
        ("T5", "ForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
        ("OPT", "ForCausalLM", TaskType.CAUSAL_LM),
        ("Mixtral", "ForCausalLM", TaskType.CAUSAL_LM),
        ("ViT", "ForImageClassification", None),
    ],
)
def test_all_linear_picks_what_peft_picks(family, head, task):
    model = transformer(family, head)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", task_type=task))
    apply_allora(model, r=2)
    assert sorted(adapter_layers(model)) == sorted(wrapped.targeted_module_names)
    assert len(adapter_layers(model)) >= 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "proj"]},
        {"target_modules": ("up_proj",), "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.1\.(mlp|self_attn)\.[gq].*_proj"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*proj", "exclude_modules": r".*mlp.*"},
        {"target_modules": "ALL-linear", "exclude_modules": {"down_proj"}},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.0.mlp", "norm"]},
    ],
    ids=str,
)
def test_names_are_matched_as_in_peft(arguments):
    model = llama()
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    report = apply_allora(model, r=2, **arguments)
    assert sorted(adapter_layers(model)) == sorted(wrapped.targeted_module_names)
    kept = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    assert sorted(report.modules_to_save) == sorted(kept)


def test_rank_pattern_is_read_as_in_peft():
    pattern = {"layers.0.self_attn.q_proj": 5, "q_proj": 7, r"^model\.layers\.1\.mlp\..*": 3}
    model = llama()
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", rank_pattern=pattern)
    ).base_model.model
    apply_allora(model, r=2, rank_pattern=pattern)
    ranks = {name: layer.r for name, layer in adapter_layers(model).items()}
    assert ranks == {name: wrapped.get_submodule(name).r["default"] for name in ranks}
    assert set(ranks.values()) == {2, 3, 5, 7}


def test_the_classification_head_can_be_trained_whole():
    model = bert()
    report = apply_allora(model, modules_to_save=["classifier"])
    assert report.modules_to_save == ("classifier",)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_a_frozen_classification_head_is_reported():
    report = apply_allora(bert())
    assert "modules_to_save" in report.skipped["classifier"]


# --- what changes and what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_a_new_adapter_changes_nothing_and_shares_the_weights(build):
    model = build()
    before, weights = logits(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    apply_allora(model, r=3)
    torch.testing.assert_close(logits(model), before)
    after = {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    assert after == weights
    for layer in adapter_layers(model).values():
        assert not layer.training


def test_only_adapters_and_saved_modules_train():
    model = Net()
    apply_allora(model, r=2, eta=1.5, norm="matrix", target_modules=["q"], modules_to_save=["head"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    factors = {f"blocks.{i}.q.lora_{f}" for i in (0, 1) for f in "AB"}
    assert changed == factors | {"head.weight", "head.bias"}
    assert {(layer.eta, layer.norm, layer.r) for layer in adapter_layers(model).values()} == {(1.5, "matrix", 2)}
    assert {id(p) for p in adapter_parameters(model)} == {id(p) for n, p in model.named_parameters() if n in factors}


@pytest.mark.parametrize(
    "dtype, autocast, expected",
    [
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_adapter_dtype(dtype, autocast, expected):
    model = Net().to(dtype)
    apply_allora(model, modules_to_save=["head"], autocast_adapter_dtype=autocast)
    assert {p.dtype for p in adapter_parameters(model)} == {expected}
    assert model.head.weight.dtype == model.blocks[0].q.weight.dtype == dtype


def test_a_name_that_excludes_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"exclude_modules: the model has no module 'heed'; did you mean 'head'"):
        apply_allora(Net(), r=2, target_modules=["q"], exclude_modules=["heed", "k"])


def test_accelerates_hooks_are_named():
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    accelerate.hooks.add_hook_to_module(model.blocks[0].q, accelerate.hooks.ModelHook())
    report = apply_allora(model, r=2, target_modules=["q"])
    assert "accelerate's hooks are on it (device_map, offloading)" in report.skipped["blocks.0.q"]


def test_report_counts_and_reads_well():
    model = Net()
    report = apply_allora(
        model, r=2, target_modules=["q", "k", "embed", "nowhere"], exclude_modules=["1.k"], modules_to_save=["head"]
    )
    assert report.adapted == {"blocks.0.q": (8, 8, 2), "blocks.0.k": (4, 8, 2), "blocks.1.q": (8, 8, 2)}
    assert report.trainable == 2 * (2 * 16) + 2 * 12 + 27
    assert report.total == report.trainable + 80 + 2 * (72 + 36 + 72 + 16)
    assert report.skipped["blocks.1.k"] == "in exclude_modules"
    assert "Embedding" in report.skipped["embed"]
    assert "no such module" in report.skipped["nowhere"]
    text = str(report)
    assert text.startswith("3 layers adapted: 115 of 587 parameters train (19.59%)")
    assert "2 x blocks.*.q [8, 8], r=2" in text
    assert "trained and saved whole: head" in text
    assert "1 x nowhere: " in text


class SharedParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block()])
        self.again, self.mirror = self.first, self.blocks[0]

    def forward(self, x):
        return self.again(self.mirror(self.blocks[0](self.first(x))))


@pytest.mark.parametrize("target", ["all-linear", ["first", "q"], ["again", "mirror.q"]], ids=str)
def test_a_shared_layer_is_adapted_once_and_stays_shared(target):
    model = SharedParts()
    apply_allora(model, r=2, target_modules=target)
    assert model.again is model.first and isinstance(model.first, FusedALLoRALinear)
    assert model.mirror is model.blocks[0] and isinstance(model.mirror.q, FusedALLoRALinear)
    assert set(adapter_layers(model)) >= {"first", "blocks.0.q"}
    pretend_to_train(model)
    x = torch.randn(3, 8)
    want = model(x)
    merge_adapter(model)
    assert model.again is model.first and type(model.first) is nn.Linear
    torch.testing.assert_close(model(x), want)


def test_deepcopy_and_pickle_are_independent_and_complete():
    model = Net()
    apply_allora(model, r=2, modules_to_save=["head"])
    pretend_to_train(model)
    want = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(IDS), want, rtol=0, atol=0)
        twin(IDS).sum().backward()
        assert all(p.grad is not None for n, p in twin.named_parameters() if "out.lora" in n or "head" in n)
        with torch.no_grad():
            adapter_parameters(twin)[0].zero_()
        torch.testing.assert_close(model(IDS), want, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_stay_out_of_names(wrap):
    model = Net()
    report = apply_allora(wrap(model), target_modules=r"blocks\.\d\.q")
    assert list(report.adapted) == ["blocks.0.q", "blocks.1.q"]
    assert isinstance(model.blocks[1].q, FusedALLoRALinear)


# --- layers that cannot be adapted ----------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """As bitsandbytes stores it: packed bytes, and a forward pass that unpacks them."""

    def __init__(self, k, n):
        super().__init__(k, n)
        self.weight = nn.Parameter(torch.zeros(k * n // 2, 1, dtype=torch.uint8), requires_grad=False)


class DoublingLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class QuantLinear(nn.Module):
    """As GPTQ's: no nn.Linear at all."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


def float8_linear():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def hooked_linear():
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda *_: None)
    return layer


def replaced_forward():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


class MambaMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log, self.D = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(8))
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return fused_mixer(x, self.out_proj.weight) if x.is_cuda else self.out_proj(x)


def fused_mixer(x, weight):
    return x @ weight.mT


class Attends(nn.Module):
    """Takes a weight for its values, and looks at another's dtype."""

    def __init__(self):
        super().__init__()
        self.taken, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        assert isinstance(self.taken, nn.Linear)
        return self.called((x @ self.taken.weight.mT).to(self.called.weight.dtype))


class KeepsList(nn.Module):
    """As transformers' Mask2Former does with the layers of its predictions."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


UNSUITABLE = {
    "4bit": (lambda: Linear4bit(8, 8), "", "uint8"),
    "float8": (float8_linear, "", "float8_e4m3fn"),
    "gptq": (QuantLinear, "", "QuantLinear"),
    "own forward": (lambda: DoublingLinear(8, 8), "", "forward pass of its own"),
    "replaced forward": (replaced_forward, "", "forward pass of its own"),
    "hooks": (hooked_linear, "", "hooks"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "", "parametrized"),
    "empty": (lambda: nn.Linear(0, 8), "", "empty"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), ".out_proj", "MultiheadAttention reads this layer's weight"),
    "mamba": (MambaMixer, ".out_proj", "MambaMixer reads this layer's weight"),
    "list": (KeepsList, ".0", "in a plain list"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", UNSUITABLE)
def test_an_unsuitable_layer_is_left_alone_with_a_reason(case):
    build, suffix, reason = UNSUITABLE[case]
    model = nn.ModuleDict({"odd": build(), "plain": nn.Linear(8, 8)})
    odd = model["odd"]
    report = apply_allora(model, r=2)
    assert list(report.adapted) == ["plain"]
    assert reason in report.skipped[f"odd{suffix}"]
    assert model["odd"] is odd

    model = nn.ModuleDict({"odd": build()})
    before = photograph(model)
    with pytest.raises(ValueError, match=rf"leaves no layer to adapt.*odd{re.escape(suffix)}: .*{reason}"):
        apply_allora(model, r=2)
    assert photograph(model) == before


def test_a_layer_of_which_the_weight_alone_is_taken_is_left_alone():
    model = Attends()
    report = apply_allora(model, r=2)
    assert list(report.adapted) == ["called"]
    assert "Attends reads this layer's weight" in report.skipped["taken"]


@pytest.mark.parametrize(
    "family, head, bypassed, called",
    [
        ("Mamba", "ForCausalLM", {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
        ("Jamba", "ForCausalLM", {"dt_proj"}, {"in_proj", "x_proj", "out_proj"}),
        ("WavLM", "Model", {"q_proj", "k_proj", "v_proj", "out_proj"}, {"gru_rel_pos_linear"}),
        ("Wav2Vec2", "ForXVector", {"kernel"}, {"q_proj", "out_proj", "projector"}),
        ("MobileBert", "ForMaskedLM", {"predictions.dense", "predictions.decoder"}, {"predictions.transform.dense"}),
        ("LayoutLMv3", "Model", {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}, {"query"}),
    ],
)
def test_transformers_own_direct_readers_of_weights(family, head, bypassed, called):
    report = apply_allora(transformer(family, head), r=2)
    reasons = {name for name, reason in report.skipped.items() if "reads this layer" in reason}
    assert all(any(name.endswith(end) for name in reasons) for end in bypassed - {"predictions.decoder"})
    assert not [name for name in report.adapted if name.endswith(tuple(bypassed))]
    assert all(any(name.endswith(end) for name in report.adapted) for end in called)


def test_what_is_adapted_is_called():
    """Every adapter of a model in which some layers are only read gets a gradient."""
    model = transformer("Wav2Vec2", "ForXVector")
    apply_allora(model, r=2, target_modules="all-linear")
    model(torch.randn(2, 400)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("lora_B"))


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_computes_as_linear_layers_do_where_they_have_no_bias(bias):
    model = transformer("Falcon", "ForCausalLM", bias=bias)
    ids = torch.arange(12).reshape(2, 6)
    want = model(ids).logits
    if bias:
        with pytest.raises(ValueError, match="FalconLinear with a forward pass of its own"):
            apply_allora(model, r=2)
        return
    report = apply_allora(model, r=2)
    assert {name.rpartition(".")[2] for name in report.adapted} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    with disable_adapters(model):
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_encoders_do_not_pass_the_adapter_by_in_eval_mode(norm_first, padded):
    """Their fast path for inference reads linear1.weight, so in eval mode the adapter would be silently ignored."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]]) if padded else None
    kept = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    apply_allora(model, r=2)
    assert len(adapter_layers(model)) == 4
    pretend_to_train(model)
    with torch.no_grad():
        slow = model.train()(x, src_key_padding_mask=mask)
        fast = model.eval()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(fast[kept], slow[kept])
        without = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
        assert not torch.allclose(fast[kept], without(x, src_key_padding_mask=mask)[kept], atol=1e-3)
        merge_adapter(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[kept], slow[kept])
    assert model.use_nested_tensor is (not norm_first)
    assert [part.activation_relu_or_gelu for part in model.layers] == [1, 1]


def test_an_encoder_without_adapters_keeps_its_fast_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.ModuleDict({"encoder": encoder, "other": nn.Linear(8, 8)})
    apply_allora(model, target_modules=["other"])
    assert encoder.use_nested_tensor and encoder.layers[0].activation_relu_or_gelu


# --- mistakes: an error that says what is wrong, and an untouched model ----------------------------------------------


MISTAKES = {
    "no match": ({"target_modules": ["query"]}, ValueError, r"target_modules=\['query'\].*: blocks.0.q, .*7 in all"),
    "no full match": ({"target_modules": r"blocks\.0\."}, ValueError, "leaves no layer"),
    "all excluded": ({"exclude_modules": ".*"}, ValueError, "in exclude_modules"),
    "no linear": ({"target_modules": ["norm"]}, ValueError, "LayerNorm is neither nn.Linear nor"),
    "empty list": ({"target_modules": []}, ValueError, "leaves no layer"),
    "empty name": ({"target_modules": [""]}, ValueError, "empty name"),
    "bad regex": ({"target_modules": "q("}, ValueError, "target_modules: 'q\\(' is not a regular expression"),
    "bad exclude": ({"exclude_modules": "*"}, ValueError, "exclude_modules: .* is not a regular expression"),
    "targets None": ({"target_modules": None}, TypeError, "target_modules must be a list"),
    "targets int": ({"target_modules": [1]}, TypeError, "target_modules must be a list"),
    "save string": ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list"),
    "save typo": ({"modules_to_save": ["heat"]}, ValueError, "ends in 'heat'.*embed, blocks, head"),
    "rank zero": ({"r": 0}, ValueError, "r must be between"),
    "rank bool": ({"r": True}, TypeError, "r must be an int"),
    "eta": ({"eta": -1.0}, ValueError, "eta must be"),
    "norm": ({"norm": "rows"}, ValueError, "norm must be one of"),
    "pattern typo": ({"rank_pattern": {"qq": 4}}, ValueError, "rank_pattern\\['qq'\\] matches none"),
    "pattern rank": ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern\\['q'\\]: r must be"),
    "pattern type": ({"rank_pattern": {"q": "4"}}, TypeError, "rank_pattern\\['q'\\]: r must be"),
    "pattern regex": ({"rank_pattern": {"q(": 4}}, ValueError, "rank_pattern: .* is not a regular expression"),
    "pattern list": ({"rank_pattern": ["q"]}, TypeError, "rank_pattern must map"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_leaves_the_model_untouched(case):
    arguments, error, message = MISTAKES[case]
    model = Net()
    model.embed.weight.requires_grad_(False)
    before = photograph(model)
    with pytest.raises(error, match=message):
        apply_allora(model, **arguments)
    assert photograph(model) == before


def test_running_out_of_memory_leaves_the_model_untouched(monkeypatch):
    model = Net()
    before = photograph(model)
    made = []

    def from_linear(linear, *args, real=FusedALLoRALinear.from_linear, **kwargs):
        if len(made) == 3:
            raise torch.OutOfMemoryError("out of memory")
        made.append(real(linear, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(FusedALLoRALinear, "from_linear", from_linear)
    with pytest.raises(torch.OutOfMemoryError):
        apply_allora(model)
    assert len(made) == 3 and photograph(model) == before


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nn.Linear(4, 4), r"itself a Linear.*from_linear"),
        (lambda: Conv1D(4, 4), r"itself a Conv1D.*from_linear"),
        (lambda: FusedALLoRALinear(4, 4, r=2), "itself a FusedALLoRALinear"),
        (lambda: torch.compile(nn.Linear(4, 4)), "itself a Linear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "1 is not initialised yet"),
        (lambda: nn.Sequential(nn.ReLU()), "no linear layers at all"),
        (lambda: nn.Sequential(nn.Linear(4, 4), FusedALLoRALinear(4, 4, r=2)), r"already has adapters \(at 1\)"),
        (lambda: get_peft_model(Net(), LoraConfig(target_modules=["q"])), "already has PEFT adapters"),
    ],
)
def test_models_that_cannot_be_adapted(build, message):
    model = build()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        apply_allora(model)
    assert photograph(model) == before


def test_a_distributed_wrapper_must_come_later():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

    with pytest.raises(ValueError, match="before FullyShardedDataParallel wraps it"):
        apply_allora(FullyShardedDataParallel())


def test_only_modules_are_models():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got dict"):
        apply_allora({})


def test_a_tied_module_cannot_be_saved_alone():
    model = llama(tie_word_embeddings=True)
    before = photograph(model)
    with pytest.raises(ValueError, match=r"embed_tokens shares a parameter with lm_head\.weight"):
        apply_allora(model, modules_to_save=["embed_tokens"])
    assert photograph(model) == before
    report = apply_allora(model, modules_to_save=["embed_tokens", "lm_head"])
    assert report.modules_to_save == ("model.embed_tokens", "lm_head")


def test_a_quantized_module_cannot_be_trained_whole():
    model = nn.ModuleDict({"head": Linear4bit(8, 8), "plain": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"head has a torch\.uint8 parameter"):
        apply_allora(model, modules_to_save=["head"])
    assert model["plain"].weight.requires_grad


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_merge_computes_the_same_with_plain_layers(build):
    plain = build()
    model = copy.deepcopy(plain)
    apply_allora(model, r=3)
    pretend_to_train(model)
    frozen = {name: (layer.weight, layer.weight.clone()) for name, layer in adapter_layers(model).items()}
    want = logits(model)
    assert not torch.allclose(want, logits(plain), atol=1e-3)
    assert merge_adapter(model) is model
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    for weight, before in frozen.values():
        assert torch.equal(weight, before)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), want, rtol=1e-5, atol=1e-5)


def test_a_merged_head_that_was_tied_may_be_tied_again():
    model = llama(tie_word_embeddings=True)
    apply_allora(model, r=3, target_modules=["lm_head"])
    pretend_to_train(model)
    adapted = logits(model)
    with pytest.warns(UserWarning, match="lm_head shared its weight with another module .* set it False first"):
        merge_adapter(model)
    torch.testing.assert_close(logits(model), adapted)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Of adapters elsewhere there is nothing to say.
    model = llama(tie_word_embeddings=True)
    apply_allora(model, r=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(model)


def test_after_merging_adapters_can_be_put_on_again():
    model = Net()
    apply_allora(model, modules_to_save=["head"])
    merge_adapter(model)
    assert apply_allora(model, target_modules=["q"]).modules_to_save == ()
    assert not model.head.weight.requires_grad


def test_merge_needs_adapters():
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapter(Net())
    layer = FusedALLoRALinear(4, 4, r=2)
    with pytest.raises(ValueError, match=r"use its merge\(\)"):
        merge_adapter(layer)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        merge_adapter("model")


# --- imports --------------------------------------------------------------------------------------------------------


def test_neither_transformers_nor_peft_is_needed(tmp_path):
    code = f"""
import sys
sys.modules["transformers"] = sys.modules["peft"] = None
import torch
from torch import nn
from allora_kernels import apply_allora, merge_adapter
from allora_kernels import load_adapter, save_adapter
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
apply_allora(model, r=2)
save_adapter(model, {str(tmp_path)!r})
load_adapter(merge_adapter(model), {str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
