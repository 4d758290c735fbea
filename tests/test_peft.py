"""ALLoRA as a PeftModel: what trains, by which rule, what is refused, and what is on disk."""

import copy
import importlib.util
import json
import pickle
import warnings
from dataclasses import fields

import accelerate
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, bert, gpt2, llama, logits, photograph, randomised, transformer
from torch import nn
from transformers import Trainer, TrainingArguments

from allora_kernels import adapter_layers, apply_allora, load_adapter, per_sample, reference, save_adapter
from allora_kernels.integrations.opacus import reasons_against
from allora_kernels.integrations.peft import (
    ALLoRAConfig,
    ALLoRALinear,
    accelerate_lora,
    explain,
    get_allora_model,
    load_allora_model,
)
from allora_kernels.integrations.peft import config as peft_config

IDS = torch.arange(14).reshape(2, 7) * 5 % VOCAB
QV = ("q_proj", "v_proj")

pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'")


def lora(r=4, **settings):
    return LoraConfig(**{"r": r, "lora_alpha": r, "target_modules": list(QV), **settings})


def adapted(base=None, eta=0.7, norm="row", **settings):
    return randomised(get_allora_model(llama() if base is None else base, lora(**settings), eta, norm))


def gradients(model):
    """By name, of every parameter that gets one from a language model's loss."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", reference.NORMS)
def test_gradients_are_those_of_our_own_model(norm, tmp_path):
    model = adapted(norm=norm).train()
    assert isinstance(model, PeftModel) and isinstance(model.base_model, peft.LoraModel)
    model.save_pretrained(tmp_path)
    own = llama()
    load_adapter(own, tmp_path)
    own.train()
    assert {(m.eta, m.norm) for m in adapter_layers(own).values()} == {(0.7, norm)}
    torch.testing.assert_close(model(input_ids=IDS).logits, own(input_ids=IDS).logits)
    theirs = {
        name.replace(".default.weight", "").removeprefix("base_model.model."): g for name, g in gradients(model).items()
    }
    ours = gradients(own)
    assert len(ours) == 8 and ours.keys() == theirs.keys()
    torch.testing.assert_close(theirs, ours)
    if norm is not None:
        without = copy.deepcopy(own)
        for layer in adapter_layers(without).values():
            layer.norm = None
        plain = gradients(without)
        assert all(not torch.allclose(plain[n], ours[n], rtol=1e-2) for n in plain), "the rule changes nothing"


def test_a_fresh_adapter_is_the_base_model_and_trains():
    model = get_allora_model(llama(), lora(target_modules="all-linear"))
    torch.testing.assert_close(logits(model), logits(llama()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def layers_of(model):
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, ALLoRALinear)
    }


@pytest.mark.parametrize(
    "build, settings",
    [
        (llama, {"target_modules": "all-linear"}),
        (llama, {"target_modules": r"model\.layers\.1\.mlp\..*_proj"}),
        (llama, {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]}),
        (llama, {"layers_to_transform": [1]}),
        (llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}}),
        (llama, {"modules_to_save": ["lm_head"]}),
        (lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}),
        (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
        (llama, {"layer_replication": [(0, 2), (1, 2)]}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings=True`")
def test_it_adapts_and_trains_what_peft_does(build, settings, tmp_path):
    stock = peft.get_peft_model(build(), lora(**settings))
    model = get_allora_model(build(), lora(**settings))
    assert trained(model) == trained(stock)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert len(layers_of(model)) == sum(isinstance(m, peft.tuners.lora.Linear) for m in stock.modules())
    assert not explain(model).pefts
    randomised(model)
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model.eval()), logits(stock.eval()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(again.eval()), logits(model))
    resumed = load_allora_model(build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(resumed.eval()), logits(model))
    assert trained(resumed) == trained(model) and resumed.peft_config["default"].allora_norm == "row"


def test_the_users_config_is_left_alone():
    config = lora(target_modules="all-linear")
    before = copy.deepcopy(config.to_dict())
    model = get_allora_model(llama(), config, 1.0, "token")
    assert config.to_dict() == before and config._custom_modules is None
    kept = model.peft_config["default"]
    assert (kept.allora_eta, kept.allora_norm) == (1.0, "token") and kept is not config


def test_get_peft_model_takes_the_config_itself():
    config = ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV), allora_eta=0.7, allora_norm="matrix")
    model = randomised(peft.get_peft_model(llama(), config))
    torch.testing.assert_close(gradients(model), gradients(adapted(norm="matrix")))


def test_a_copied_config_speaks_for_itself():
    config = ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV))
    other = copy.copy(config)
    other.allora_norm = "token"
    model = peft.get_peft_model(llama(), other)
    assert {m.allora_norm["default"] for m in layers_of(model).values()} == {"token"}
    with pytest.raises(TypeError, match="_register_custom_module is for LoraConfig"):
        config._register_custom_module({nn.Linear: nn.Linear})


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone(init):
    model = get_allora_model(llama(), lora(init_lora_weights=init))
    before = llama().state_dict()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.base_layer.weight, before[f"{name}.weight"])
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_gradient_checkpointing_and_autocast():
    model = adapted().train()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model), plain)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model)
    assert all(
        torch.nn.functional.cosine_similarity(rough[n].flatten(), plain[n].flatten(), dim=0) > 0.99 for n in plain
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def test_torchs_encoder_does_not_pass_its_adapters_by():
    """In eval mode without gradients torch reads the weights of these layers itself, and so misses PEFT's adapters."""
    model = get_allora_model(Encoder(), lora(target_modules=["linear1", "linear2"], init_lora_weights=False)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, model(x))
    assert not torch.allclose(y, Encoder().eval()(x), atol=1e-2)


def test_the_layer_compiles_whole():
    model = adapted().train()
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 16, requires_grad=True)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(layer(x).square().sum(), leaves))


# --- refused --------------------------------------------------------------------------------------------------------

BAD = {
    "dropout": ({"lora_dropout": 0.1}, ValueError, "lora_dropout=0.1 .*no dropout: write lora_dropout=0.0"),
    "dora": ({"use_dora": True}, ValueError, "use_dora=True .*write use_dora=False"),
    "rslora": ({"use_rslora": True}, ValueError, "use_rslora=True .*no scaling: write use_rslora=False"),
    "alpha": ({"lora_alpha": 8}, ValueError, "lora_alpha=8 with r=4 is a scaling, .*write lora_alpha=4"),
    "a rank pattern alone": (
        {"rank_pattern": {"q_proj": 2}}, ValueError, r"alpha_pattern=\{\} .*write alpha_pattern=\{'q_proj': 2\}",
    ),
    "an alpha pattern alone": ({"alpha_pattern": {"q_proj": 2}}, ValueError, r"write alpha_pattern=\{\}"),
    "alpha of another type": ({"lora_alpha": "4"}, ValueError, "lora_alpha='4' with r=4 is a scaling"),
    "a rank pattern that is a list": ({"rank_pattern": ["q_proj"]}, TypeError, r"rank_pattern must be a dict .*\['q_proj'\]"),
    "a rank of another type": ({"rank_pattern": {"q_proj": "2"}}, TypeError, "r must be an int, got str"),
    "lora bias": ({"lora_bias": True}, ValueError, "write lora_bias=False"),
    "trained biases": ({"bias": "all"}, ValueError, "bias='all' .*write bias='none'"),
    "alora": ({"alora_invocation_tokens": [1]}, ValueError, "write alora_invocation_tokens=None"),
    "parameters": ({"target_parameters": ["embed_tokens.weight"]}, ValueError, "write target_parameters=None"),
    "pissa": ({"init_lora_weights": "pissa"}, ValueError, "'pissa' changes the base .*write init_lora_weights=True"),
    "olora": ({"init_lora_weights": "olora"}, ValueError, "'olora' changes the base .*write init_lora_weights=True"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ValueError, "'loftq' changes the base",
    ),
    "rank zero": ({"r": 0, "lora_alpha": 0}, ValueError, "r must be between 1 and 256, got 0"),
    "a large rank": ({"r": 300, "lora_alpha": 300}, ValueError, "r must be between 1 and 256, got 300"),
    "a large rank in a pattern": ({"rank_pattern": {"q_proj": 999}}, ValueError, "got 999"),
    "eta": ({"eta": 0}, ValueError, "eta must be finite and > 0"),
    "eta of another type": ({"eta": "2"}, TypeError, "eta must be a float, got str"),
    "norm": ({"norm": "rows"}, ValueError, "norm must be one of"),
    "nothing to adapt": ({"target_modules": ["nothing"]}, ValueError, "not found in the base model"),
    "an embedding": (
        {"target_modules": ["v_proj", "embed_tokens"]}, ValueError, "Embedding.*plain LoRA.*exclude_modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings, error, message", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_settings_are_refused_and_change_nothing(settings, error, message):
    model = llama()
    before = photograph(model)
    rule = {key: value for key, value in settings.items() if key in ("eta", "norm")}
    config = {key: value for key, value in settings.items() if key not in rule}
    with pytest.raises(error, match=message):
        get_allora_model(model, lora(**config), **rule)
    assert photograph(model) == before


DEFAULTS = {f.name: f.default for f in fields(LoraConfig)}


@pytest.mark.parametrize("name", [name for name in peft_config._NO_MEANING if name in DEFAULTS])
def test_each_setting_without_a_meaning_has_the_line_to_write(name):
    config = ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV))
    setattr(config, name, "something")
    model = llama()
    before = photograph(model)
    message = f"{name}='something' has no meaning here, as .*: write {name}={DEFAULTS[name]!r}"
    with pytest.raises(ValueError, match=rf"^{message}(\. Where it is None, .*)?$"):
        peft.get_peft_model(model, config)
    assert photograph(model) == before


def test_a_variant_that_a_newer_peft_brings_is_refused(monkeypatch):
    variants = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
    if not variants:
        pytest.skip("this PEFT does not say which of its settings are variants")
    monkeypatch.delitem(peft_config._NO_MEANING, variants[0])
    with pytest.raises(
        ValueError, match=f"{variants[0]} has no meaning here, as it makes another layer.*: leave it out"
    ):
        get_allora_model(llama(), lora(**{variants[0]: True}))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 8)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "model, target, message",
    [
        (Reads(), ["out_proj"], "out_proj: MultiheadAttention reads this layer's weight itself"),
        (nn.Sequential(nn.Linear(4, 4), Own(4, 4)), ["0", "1"], "forward pass of its own"),
        (nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)), ["0", "1"], "Conv2d is neither"),
    ],
)
def test_targets_that_would_not_be_allora_are_refused(model, target, message):
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        get_allora_model(model, lora(target_modules=target))
    assert photograph(model) == before


@pytest.mark.skipif(
    importlib.util.find_spec("peft.utils.transformers_weight_conversion") is None,
    reason="this PEFT knows nothing of a mixture's experts",
)
@pytest.mark.parametrize("target", ["all-linear", ["gate_proj", "up_proj"]], ids=str)
def test_what_peft_takes_for_experts_is_refused_with_a_way_out(target):
    model = transformer("Qwen3Moe", "ForCausalLM")
    before = photograph(model)
    with pytest.raises(ValueError, match=r"Where it is None, PEFT took some of target_modules for a mixture's experts"):
        get_allora_model(model, lora(target_modules=target))
    assert photograph(model) == before
    get_allora_model(model, lora(target_modules=["q_proj"]))


class WithParameter(nn.Module):
    """Its input embeddings are a parameter, as in transformers' Perceiver."""

    def __init__(self):
        super().__init__()
        self.queries, self.q_proj = nn.Parameter(torch.ones(2, 8)), nn.Linear(8, 8)

    def get_input_embeddings(self):
        return self.queries

    def enable_input_require_grads(self):
        pass

    def forward(self):
        return self.q_proj(self.queries)


@pytest.mark.parametrize(
    "build", [WithParameter, lambda: transformer("Wav2Vec2", "Model")], ids=["parameter", "unsaid"]
)
def test_a_model_whose_embeddings_are_no_module_is_loaded(build, tmp_path):
    model = adapted(build(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    loaded = load_allora_model(build(), tmp_path)
    found = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert found and all(torch.equal(model.get_parameter(name), loaded.get_parameter(name)) for name in found)


def test_other_configs_and_models_are_refused():
    with pytest.raises(TypeError, match=r"config must be a peft.LoraConfig, got AdaLoraConfig"):
        get_allora_model(llama(), peft.AdaLoraConfig(total_step=10))
    with pytest.raises(TypeError, match=r"is an ALLoRAConfig: pass a plain peft\.LoraConfig, and the rule as eta="):
        get_allora_model(llama(), ALLoRAConfig())
    with pytest.raises(TypeError, match="names the class of its layers itself"):
        ALLoRAConfig()._register_custom_module({nn.Linear: nn.Linear})
    taken = lora()
    taken._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(ValueError, match="custom modules of its own"):
        get_allora_model(llama(), taken)
    model = peft.get_peft_model(llama(), lora())
    before = photograph(model)
    with pytest.raises(ValueError, match="already has PEFT adapters"):
        get_allora_model(model, lora())
    assert photograph(model) == before
    others = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="has adapters of another kind: merge_and_unload"):
        peft.get_peft_model(others.base_model.model, ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV)))
    own = llama()
    apply_allora(own, r=2)
    with pytest.raises(ValueError, match="already has adapters"):
        get_allora_model(own, lora())


def test_a_config_changed_afterwards_is_checked_again():
    config = ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV))
    config.lora_dropout = 0.5
    with pytest.raises(ValueError, match=r"lora_dropout=0.5"):
        peft.get_peft_model(llama(), config)


# --- calls that are not fused ---------------------------------------------------------------------------------------


def two_adapters():
    model = adapted()
    second = ALLoRAConfig(r=2, lora_alpha=2, target_modules=["q_proj", "o_proj"], allora_eta=1.5, allora_norm="token")
    model.add_adapter("second", second)
    return randomised(model)


def test_a_second_adapter_has_its_own_rule():
    model = two_adapters()
    default = gradients(model)
    rules = {
        (m.allora_eta.get("second"), m.allora_norm.get("second")) for n, m in layers_of(model).items() if "v_" not in n
    }
    assert rules == {(1.5, "token")} and len(layers_of(model)) == 6
    model.set_adapter("second")
    only = randomised(
        get_allora_model(llama(), lora(2, target_modules=["q_proj", "o_proj"]), 1.5, "token", adapter_name="second")
    )
    peft.set_peft_model_state_dict(only, peft.get_peft_model_state_dict(model, adapter_name="second"), "second")
    torch.testing.assert_close(gradients(model), gradients(only))
    model.delete_adapter("second")
    assert all(set(m.allora_norm) <= {"default"} for m in layers_of(model).values())
    model.set_adapter("default")
    torch.testing.assert_close(gradients(model), default)


def test_several_active_adapters_do_not_train_as_plain_lora():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    assert any("2 active adapters: default, second" in why for why in explain(model).pefts.values())
    with pytest.raises(
        RuntimeError, match=r"cannot train default, second by ALLoRA's rule.*2 active adapters.*set_adapter"
    ):
        model.train()(input_ids=IDS)
    loss = model.eval()(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="by ALLoRA's rule"):
        loss.backward()


@pytest.mark.parametrize(
    "config, message",
    [
        (lora(), "LoraConfig says no eta and norm.*ALLoRAConfig"),
        (lora(lora_alpha=16), "LoraConfig says no eta and norm"),
        (lora(target_modules=["o_proj"]), "LoraConfig says no eta and norm"),
    ],
)
def test_a_second_adapter_without_a_rule_is_refused(config, message):
    model = adapted()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config)
    assert photograph(model) == before and list(model.peft_config) == ["default"]


def test_a_second_adapter_that_fails_half_way_leaves_nothing():
    model = adapted()
    before = photograph(model)
    bad = ALLoRAConfig(r=4, lora_alpha=4, target_modules=["q_proj", "o_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="Embedding"):
        model.add_adapter("second", bad)
    assert photograph(model) == before and list(model.peft_config) == ["default"]


def test_an_adapter_without_a_rule_computes_and_does_not_train(tmp_path):
    stock = randomised(peft.get_peft_model(llama(), lora(2, lora_alpha=8)))
    stock.save_pretrained(tmp_path)
    model = adapted()
    model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    torch.testing.assert_close(logits(model.eval()), logits(stock.eval()))
    with pytest.raises(RuntimeError, match=r"adapter 'plain' has no eta and norm.*load_allora_model"):
        model.train()(input_ids=IDS)


def test_a_reference_pass_while_training():
    model = adapted().train()
    want = gradients(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits(llama()))
    torch.testing.assert_close(gradients(model), want)


def test_weights_that_come_by_way_of_the_meta_device(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = load_allora_model(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    torch.testing.assert_close(gradients(again), gradients(model))


@pytest.mark.parametrize("kept", [True, False])
def test_dtypes_are_pefts(kept):
    arguments = {"autocast_adapter_dtype": not kept}
    model = randomised(get_allora_model(llama().to(torch.bfloat16), lora(), 0.7, **arguments))
    stock = peft.get_peft_model(llama().to(torch.bfloat16), lora(), **arguments)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model), logits(stock), rtol=0.02, atol=0.02)
    assert logits(model).dtype == torch.bfloat16
    assert {g.dtype for g in gradients(model).values()} == {torch.bfloat16 if kept else torch.float32}


def test_a_variant_beside_it_computes_and_does_not_train(tmp_path):
    randomised(peft.get_peft_model(llama(), lora(use_dora=True))).save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path)
    model = adapted()
    model.load_adapter(tmp_path, "dora")
    model.set_adapter("dora")
    torch.testing.assert_close(logits(model.eval()), logits(stock.eval()))
    with pytest.raises(RuntimeError, match=r"cannot train dora.*DoraLinearVariant.*that has a rule"):
        model.train()(input_ids=IDS)


def test_a_scaled_adapter_computes_and_does_not_train():
    model = adapted()
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.5)
    stock = peft.get_peft_model(llama(), lora(lora_alpha=2))
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model.eval()), logits(stock.eval()))
    with pytest.raises(RuntimeError, match=r"'default' is scaled by 0.5 while it is trained"):
        model.train()(input_ids=IDS)


def test_hooks_inside_are_not_passed_by():
    model = adapted()
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    seen = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(args))
    logits(model.eval())
    assert len(seen) == 1 and "hooks on a module inside" in repr(layer)
    with pytest.raises(RuntimeError, match="hooks on a module inside"):
        model.train()(input_ids=IDS)
    handle.remove()
    assert "not fused" not in repr(model)


# --- on disk --------------------------------------------------------------------------------------------------------


def test_the_folder_is_pefts_with_two_keys_more(tmp_path):
    model, stock = adapted(norm="token"), peft.get_peft_model(llama(), lora())
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    ours, plain = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "stock"))
    assert {k: ours.pop(k) for k in ("allora_eta", "allora_norm")} == {"allora_eta": 0.7, "allora_norm": "token"}
    assert sorted(ours.pop("target_modules")) == sorted(plain.pop("target_modules"))
    assert ours == plain


def test_a_loaded_adapter_trains_on_as_the_one_saved(tmp_path):
    model = adapted(norm="entry").train()
    model.save_pretrained(tmp_path)
    resumed = load_allora_model(llama(), tmp_path, is_trainable=True).train()
    torch.testing.assert_close(gradients(resumed), gradients(model))
    frozen = load_allora_model(llama(), tmp_path)
    assert not trained(frozen) and frozen.peft_config["default"].inference_mode
    both = load_allora_model(adapted(), tmp_path, "second", is_trainable=True).train()
    both.set_adapter("second")
    renamed = {name.replace(".second.", ".default."): g for name, g in gradients(both).items()}
    torch.testing.assert_close(renamed, gradients(model))
    with pytest.raises(ValueError, match="adapter 'second' already"):
        load_allora_model(both, tmp_path, "second")


@pytest.mark.parametrize("build, target", [(llama, "all-linear"), (gpt2, ["c_attn", "lm_head"])])
def test_our_own_folders_are_the_same(build, target, tmp_path):
    own = build()
    apply_allora(own, r=3, eta=0.7, norm="token", target_modules=target)
    for layer in adapter_layers(own).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(own, tmp_path)
    model = load_allora_model(build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(model), logits(own))
    assert {(m.allora_eta["default"], m.allora_norm["default"]) for m in layers_of(model).values()} == {(0.7, "token")}


def test_folders_that_do_not_fit_are_refused(tmp_path):
    model = llama()
    before = photograph(model)
    peft.get_peft_model(llama(), lora()).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"no allora_eta and no allora_norm.*PeftModel.from_pretrained.*accelerate_lora"
    ):
        load_allora_model(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        load_allora_model(model, tmp_path / "nowhere", local_files_only=True)
    adapted().save_pretrained(tmp_path / "good")
    stock = peft.get_peft_model(llama(), lora())
    with pytest.raises(ValueError, match="PeftModel without ALLoRA"):
        load_allora_model(stock, tmp_path / "good")
    assert photograph(model) == before


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"num_hidden_layers": 1}, r"does not fit the model: it has no .*layers.1.self_attn.*lora_A"),
        ({"num_hidden_layers": 3}, r"does not fit the model: the model has no .*layers.2.self_attn.*lora_A"),
        ({"hidden_size": 32}, r"(?s)does not fit the model: .*size mismatch"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(saved, message, tmp_path):
    adapted(llama(**saved)).save_pretrained(tmp_path)
    for model in (llama(), adapted(norm="token")):
        before = photograph(model)
        with pytest.raises(ValueError, match=message):
            load_allora_model(model, tmp_path, "another", is_trainable=True)
        assert photograph(model) == before and "another" not in getattr(model, "peft_config", {})


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_module_saved_whole_that_the_file_lacks_is_named(second, low_cpu_mem_usage, tmp_path):
    adapted(bert(), target_modules=["query"], modules_to_save=["classifier", "pooler"]).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if "pooler" in key])
    model = adapted(bert(), target_modules=["key"]) if second else bert()
    before = photograph(model)
    names = r"base_model\.model\.bert\.pooler\.dense\.bias, base_model\.model\.bert\.pooler\.dense\.weight"
    with pytest.raises(ValueError, match=f"does not fit the model: it has no {names}, of modules_to_save"):
        load_allora_model(model, tmp_path, "new", low_cpu_mem_usage=low_cpu_mem_usage)
    assert photograph(model) == before


def test_a_file_does_not_replace_frozen_weights(tmp_path):
    adapted(bert(), target_modules=["query"], modules_to_save=["classifier"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = bert()
    before = photograph(model)
    with pytest.raises(ValueError, match=r"classifier\.bias, .*classifier\.weight would replace frozen weights"):
        load_allora_model(model, tmp_path)
    assert photograph(model) == before


def test_embeddings_in_the_file_are_loaded_or_put_back(tmp_path):
    """PEFT saves those of a vocabulary that was resized."""
    base = llama()
    base.resize_token_embeddings(VOCAB + 5)
    model = adapted(base)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = llama()
    fresh.resize_token_embeddings(VOCAB + 5)
    nn.init.normal_(fresh.lm_head.weight)
    loaded = load_allora_model(copy.deepcopy(fresh), tmp_path)
    assert torch.equal(loaded.get_base_model().lm_head.weight, base.lm_head.weight)
    change_tensors(tmp_path, lambda t: t.pop(next(key for key in t if "lora_B" in key)))
    before = photograph(fresh)
    with pytest.raises(ValueError, match=r"does not fit the model: it has no .*lora_B"):
        load_allora_model(fresh, tmp_path)
    assert photograph(fresh) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_same_model(duplicate):
    model = two_adapters()
    twin = duplicate(model)
    torch.testing.assert_close(gradients(twin), gradients(model))
    with pytest.raises(ValueError, match="says no eta and norm"):
        twin.add_adapter("third", lora())
    twin.add_adapter("third", ALLoRAConfig(r=4, lora_alpha=4, target_modules=list(QV), allora_norm="factor"))
    assert {m.allora_norm.get("third") for n, m in layers_of(twin).items() if "q_" in n} == {"factor"}
    assert all("third" not in m.allora_norm for m in layers_of(model).values())


def test_recording_it_is_refused_here_and_by_opacus():
    model = adapted()
    accelerated = peft.get_peft_model(llama(), lora())
    accelerate_lora(accelerated)
    for each in (model, accelerated):
        with pytest.raises(ValueError, match=r"q_proj.*PEFT"), per_sample.record(each):
            pass
        assert "q_proj" in reasons_against(each)[0] and "use FusedALLoRALinear" in reasons_against(each)[0]


def test_warnings_of_a_clean_run_are_none(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing")
        model = get_allora_model(gpt2(), lora(target_modules=["c_attn"]))
        model(input_ids=IDS, labels=IDS).loss.backward()
        repr(model)


# --- trainers -------------------------------------------------------------------------------------------------------


def train(folder, model, resume=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=0.05, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        use_cpu=True, save_steps=2, seed=0, **settings,
    )  # fmt: skip
    rows = torch.arange(96).reshape(12, 8) * 7 % VOCAB
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2]).train(resume_from_checkpoint=resume)
    return model


def test_trainer_resumes_from_its_checkpoint(tmp_path):
    whole = train(tmp_path / "whole", adapted(norm="token"), max_steps=4)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["allora_norm"] == "token"
    assert not (checkpoint / "model.safetensors").exists()
    resumed = train(tmp_path / "resumed", adapted(norm="token"), resume=str(checkpoint), max_steps=4)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())
    plain = train(tmp_path / "plain", adapted(norm=None), max_steps=4)
    key = next(name for name in whole.state_dict() if "lora_B" in name)
    assert not torch.allclose(plain.state_dict()[key], whole.state_dict()[key])


def test_trainer_loads_the_best_at_the_end(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    model = train(tmp_path, adapted(), max_steps=4, **best)
    assert not explain(model).pefts and trained(model)
    assert {m.allora_norm["default"] for m in layers_of(model).values()} == {"row"}


def test_a_prepared_model_may_be_switched():
    losses = []
    for switched in (False, True):
        model = randomised(peft.get_peft_model(llama(), lora(lora_alpha=8)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        if switched:
            assert len(accelerate_lora(model).ours) == 4
        run = []
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_eva_chooses_lora_a_and_the_ranks(tmp_path):
    model = get_allora_model(llama(), lora(init_lora_weights="eva", target_modules="all-linear"))
    before = logits(llama())
    batches = [{"input_ids": torch.randint(3, VOCAB, (4, 16))} for _ in range(6)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    torch.testing.assert_close(logits(model.eval()), before)
    layers = layers_of(model).values()
    assert len({m.r["default"] for m in layers}) > 1
    assert all(m.scaling["default"] == 1 and m.allora_norm["default"] == "row" for m in layers)
    assert all(g.isfinite().all() for g in gradients(model.train()).values())
    randomised(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_allora_model(llama(), tmp_path).eval()), logits(model.eval()))
