"""Adapters on disk: PEFT reads ours, we read PEFT's, and nothing broken gets in or takes a good adapter's place."""

import copy
import json
import os
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import bert, gpt2, llama, logits, photograph, pretend_to_train, transformer
from torch import nn

from allora_kernels import (
    FusedALLoRALinear,
    adapter_layers,
    adapter_parameters,
    apply_allora,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from allora_kernels.models.adapter_config import OTHER_LAYERS
from allora_kernels.models.adapter_files import factor_key, split_key

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'")


def adapted(model, **arguments):
    apply_allora(model, **{"r": 3, **arguments})
    return pretend_to_train(model)


def load_with_peft(base, path):
    """What PEFT makes of the adapter; anything it misses in the file is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        return PeftModel.from_pretrained(base, path)


def small_llama_adapter(path):
    """An adapter on the four q and v projections of `llama()`, and the logits it makes."""
    model = adapted(llama(), target_modules=["q_proj", "v_proj"])
    save_adapter(model, path)
    return logits(model)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- PEFT reads ours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, arguments",
    [
        (bert, {"modules_to_save": ["classifier"]}),
        (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier", "pooler"]}),
        (bert, {}),
        (llama, {}),
        (llama, {"rank_pattern": {r".*0.*": 5, "mlp.up_proj": 1}}),
        (llama, {"target_modules": r"model\.layers\.1\..*proj", "norm": "entry", "eta": 1.0}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.0.mlp"]}),
        (gpt2, {}),
        (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
        (lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (lambda: transformer("GPT2", "ForSequenceClassification"), {"modules_to_save": ["score"]}),
        (lambda: transformer("Roberta", "ForSequenceClassification"), {"modules_to_save": ["classifier"]}),
        (lambda: transformer("DistilBert", "ForSequenceClassification"), {"modules_to_save": ["classifier"]}),
        (lambda: transformer("DistilBert", "ForSequenceClassification"), {}),
        (lambda: transformer("Bert", "ForTokenClassification"), {}),
        (lambda: transformer("Bert", "ForTokenClassification"), {"modules_to_save": ["classifier"]}),
        (lambda: transformer("Mixtral", "ForCausalLM"), {}),
    ],
)
def test_peft_computes_what_we_do_from_our_files(build, arguments, tmp_path):
    model = adapted(build(), **arguments)
    save_adapter(model, tmp_path)
    want, base = logits(model), build()
    assert not torch.allclose(logits(base), want, atol=1e-3)
    wrapped = load_with_peft(base, tmp_path)
    assert sorted(wrapped.targeted_module_names) == sorted(adapter_layers(model))
    torch.testing.assert_close(logits(wrapped), want, rtol=1e-5, atol=1e-5)


def test_peft_adapts_no_layer_whose_name_only_ends_alike(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "inner": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    model = build()
    apply_allora(model, r=2, target_modules="proj")
    save_adapter(model, tmp_path)
    assert load_with_peft(build(), tmp_path).targeted_module_names == ["proj"]
    model = build()
    load_adapter(model, tmp_path)
    assert list(adapter_layers(model)) == ["proj"]

    model = build()
    apply_allora(model, r=2, rank_pattern={"^proj": 4})
    save_adapter(model, tmp_path)
    wrapped = load_with_peft(build(), tmp_path).base_model.model
    assert (wrapped["proj"].r["default"], wrapped["inner"]["proj"].r["default"]) == (4, 2)


def test_what_is_in_the_files(tmp_path):
    model = bert().to(torch.bfloat16)
    apply_allora(
        model, r=4, eta=1.5, norm="token", target_modules=["query", "key"], modules_to_save=["classifier"],
        rank_pattern={"1.attention.self.key": 2},
    )  # fmt: skip
    save_adapter(model, tmp_path / "new" / "folder", base_model_name_or_path="some/model")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    layers = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("key", "query")]
    odd = {r"^bert\.encoder\.layer\.1\.attention\.self\.key": 2}
    assert config == {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "some/model", "r": 4, "lora_alpha": 4,
        "rank_pattern": odd, "alpha_pattern": odd, "target_modules": layers, "modules_to_save": ["classifier"],
        "fan_in_fan_out": False, "bias": "none", "lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "inference_mode": True, "allora_eta": 1.5, "allora_norm": "token",
    }  # fmt: skip
    with safe_open(tmp_path / "new" / "folder" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = {f"{PREFIX}classifier.{name}": p for name, p in model.classifier.named_parameters()}
    for name, layer in adapter_layers(model).items():
        expected |= {f"{PREFIX}{name}.{f}.weight": getattr(layer, f) for f in ("lora_A", "lora_B")}
    assert tensors.keys() == expected.keys()
    for key, t in expected.items():
        assert tensors[key].dtype == t.dtype == (torch.bfloat16 if "classifier" in key else torch.float32)
        assert torch.equal(tensors[key], t)


@pytest.mark.parametrize(
    "build, arguments, task",
    [
        (llama, {}, "CAUSAL_LM"),
        (gpt2, {}, "CAUSAL_LM"),
        (bert, {}, None),
        (bert, {"modules_to_save": ["classifier"]}, "SEQ_CLS"),
        (lambda: transformer("Bert", "ForQuestionAnswering"), {"modules_to_save": ["qa_outputs"]}, "QUESTION_ANS"),
        (lambda: transformer("Bert", "Model"), {}, None),
    ],
)
def test_task_type_only_where_peft_finds_the_head_it_then_asks_for(build, arguments, task, tmp_path):
    model = build()
    apply_allora(model, **arguments)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["fan_in_fan_out"] is (build is gpt2)


# --- we read PEFT's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, settings",
    [
        (bert, {"task_type": TaskType.SEQ_CLS, "target_modules": "all-linear", "lora_alpha": 3}),
        (bert, {"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "dense"]}),
        (llama, {"task_type": TaskType.CAUSAL_LM, "target_modules": "all-linear", "lora_dropout": 0.1}),
        (llama, {"target_modules": r".*\.[qv]_proj", "lora_alpha": 3, "modules_to_save": ["lm_head"]}),
        (llama, {"target_modules": ["q_proj"], "use_rslora": True, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        (llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"}),
        (
            llama,
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 9}},
        ),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_we_compute_what_peft_does_from_its_files(build, settings, tmp_path):
    wrapped = get_peft_model(build(), LoraConfig(r=3, **{"lora_alpha": 6, **settings})).eval()
    for p in wrapped.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    wrapped.save_pretrained(tmp_path)
    model = build()
    report = load_adapter(model, tmp_path)
    assert sorted(report.adapted) == sorted(wrapped.targeted_module_names)
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=1e-5, atol=1e-5)
    assert {layer.norm for layer in adapter_layers(model).values()} == {None}
    assert report.trainable == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_peft_scaling_is_multiplied_into_lora_B(tmp_path):
    wrapped = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    layer = wrapped.base_model.model.get_submodule(Q0)
    nn.init.normal_(layer.lora_B["default"].weight)
    wrapped.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    assert torch.equal(model.get_submodule(Q0).lora_B, 2 * layer.lora_B["default"].weight)
    assert torch.equal(model.get_submodule(Q0).lora_A, layer.lora_A["default"].weight)


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [bert, llama, gpt2])
@pytest.mark.parametrize("into", ["the base", "adapters"])
def test_what_is_saved_comes_back(build, into, tmp_path):
    arguments = {"eta": 1.5, "norm": "factor", "rank_pattern": {r".*1.*": 2}}
    arguments["modules_to_save"] = ["classifier"] if build is bert else None
    model = adapted(build(), **arguments)
    save_adapter(model, tmp_path)
    fresh = build()
    if into == "adapters":
        apply_allora(fresh, r=3, **{**arguments, "eta": 4.0, "norm": "row"})
    report = load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in fresh.named_parameters():
        assert p.requires_grad == (name in trained)
        assert not p.requires_grad or torch.equal(p, trained[name])
    rules = {(layer.eta, layer.norm) for layer in adapter_layers(fresh).values()}
    assert rules == {(1.5, "factor") if into == "the base" else (4.0, "row")}
    assert report.adapted.keys() == adapter_layers(model).keys()
    assert report.trainable == sum(p.numel() for p in trained.values())


def test_loading_after_a_backward_pass_is_seen_by_the_next(tmp_path):
    """The coefficient C is remembered between backward passes; a loaded adapter must not meet the old one."""
    ids = torch.arange(6)[None]
    model = adapted(llama(), target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    model(input_ids=ids).logits.sum().backward()
    other = llama()
    apply_allora(other, r=3, target_modules=["q_proj"])
    other(input_ids=ids).logits.sum().backward()
    load_adapter(other, tmp_path)
    other.zero_grad()
    other(input_ids=ids).logits.sum().backward()
    for p, q in zip(adapter_parameters(model), adapter_parameters(other)):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("autocast, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_the_models_adapter_dtype_is_kept(autocast, dtype, tmp_path):
    small_llama_adapter(tmp_path)
    model = llama().to(torch.bfloat16)
    apply_allora(model, r=3, target_modules=["q_proj", "v_proj"], autocast_adapter_dtype=autocast)
    load_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")[f"{PREFIX}{Q0}.lora_A.weight"]
    assert torch.equal(model.get_submodule(Q0).lora_A, saved.to(dtype))
    fresh = llama().to(torch.bfloat16)
    load_adapter(fresh, tmp_path)
    assert {p.dtype for p in adapter_parameters(fresh)} == {torch.float32}


def test_names_do_not_tell_of_wrappers(tmp_path):
    model = adapted(llama(), target_modules=["q_proj", "v_proj"])
    save_adapter(model, tmp_path / "plain")
    part = copy.deepcopy(model)
    part.model.layers[0] = torch.compile(part.model.layers[0])
    for wrapped in (nn.DataParallel(model), torch.compile(model), part):
        save_adapter(wrapped, tmp_path / "wrapped")
        assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
        with torch.no_grad():
            adapter_parameters(wrapped)[1].zero_()
        load_adapter(wrapped, tmp_path / "plain")
    assert all(bool(p.any()) for p in adapter_parameters(model) + adapter_parameters(part))


def test_a_merged_model_takes_the_next_adapter(tmp_path):
    want = small_llama_adapter(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    load_adapter(model, tmp_path)
    assert len(adapter_layers(model)) == 4


# --- files that must not be loaded ----------------------------------------------------------------------------------


def edit_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    config.update(changes)
    kept = {key: value for key, value in config.items() if value != "REMOVED"}
    (path / "adapter_config.json").write_text(json.dumps(kept))


def test_a_factors_key_says_its_layer_and_which_it_is():
    for name in ("fc", "model.layers.0.q_proj", "experts.base_layer"):
        for factor in ("lora_A", "lora_B"):
            assert split_key(factor_key(name, factor)) == (name, factor)
    for key in ("fc.weight", "fc.lora_A.bias", "lora_A.weight", "fc.lora_C.weight", "fc.lora_A.weight.more"):
        assert split_key(key) is None


def test_each_of_pefts_other_layers_is_known_as_one():
    weights = {"use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "monteclora_config"}
    assert {*weights, "arrow_config", "alora_invocation_tokens"} == set(OTHER_LAYERS)


BAD_CONFIGS = {
    "peft_type": ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    "no peft_type": ({"peft_type": "REMOVED"}, "peft_type must be 'LORA', got None"),
    **{name: ({name: True}, f"{name}=True is another layer") for name in OTHER_LAYERS},
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication="),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices="),
    "parameters": (
        {"target_parameters": ["w"]},
        "target_parameters: the model has no parameter .w.: the model has no experts",
    ),
    "bias": ({"bias": "all"}, "bias must be 'none'.*'all'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
    "norm": ({"allora_norm": "rows"}, "norm must be one of .*'rows'"),
    "norm list": ({"allora_norm": ["row"]}, "norm must be one of"),
    "eta": ({"allora_eta": 0}, "eta must be"),
    "eta text": ({"allora_eta": "2"}, "eta must be a float"),
    "half a rule": ({"allora_eta": "REMOVED"}, "allora_eta and allora_norm must be there together"),
    "r": ({"r": 0}, "r must be between"),
    "r text": ({"r": "3"}, "r must be an int"),
    "no r": ({"r": "REMOVED"}, "r must be an int"),
    "alpha": ({"lora_alpha": "3"}, "lora_alpha .* must be finite numbers, got '3'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha .* must be finite numbers, got None"),
    "targets": ({"target_modules": None}, "target_modules must be a list of names"),
    "target regex": ({"target_modules": "("}, "not a regular expression"),
    "excluded": ({"exclude_modules": 3}, "exclude_modules must be a list"),
    "saved": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
    "pattern": ({"rank_pattern": ["q"]}, "rank_pattern and alpha_pattern must be objects"),
    "pattern regex": ({"rank_pattern": {"(": 3}}, "not a regular expression"),
    "pattern rank": ({"rank_pattern": {"q": 1000}}, "r must be between"),
    "pattern alpha": ({"alpha_pattern": {"q": "a"}}, "must be finite numbers"),
    "another rank": ({"r": 4}, r"q_proj.lora_A must be \[4, 16\], got \[3, 16\]"),
    "too few targets": ({"target_modules": ["q_proj"]}, "v_proj: not a layer of the model that target_modules names"),
    "too many targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "no lora_A and lora_B for .*k_proj"),
    "excludes one": ({"exclude_modules": [Q0]}, f"{Q0}: in exclude_modules"),
    "unsaved module": ({"modules_to_save": ["lm_head"]}, "no tensor lm_head.weight, which is in modules_to_save"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_does_not_fit_leaves_the_model_untouched(case, tmp_path):
    changes, message = BAD_CONFIGS[case]
    small_llama_adapter(tmp_path)
    edit_config(tmp_path, **changes)
    model = llama()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert photograph(model) == before


@pytest.mark.parametrize("changes", [{"velora_config": {"num_groups": 4}}, {"init_lora_weights": None}], ids=str)
def test_a_setting_that_concerns_training_alone_is_read_past(changes, tmp_path):
    want = small_llama_adapter(tmp_path)
    edit_config(tmp_path, **changes)
    model = llama()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), want)


A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
BAD_TENSORS = {
    "missing factor": (lambda t: t.pop(B), f"it has no lora_B for {Q0}"),
    "missing layer": (lambda t: (t.pop(A), t.pop(B)), f"it has no lora_A and lora_B for {Q0}"),
    "shape": (lambda t: t.update({B: t[B][:-1]}), r"lora_B must be \[16, 3\], got \[15, 3\]"),
    "transposed": (lambda t: t.update({A: t[A].mT.contiguous()}), r"lora_A must be \[3, 16\], got \[16, 3\]"),
    "vector": (lambda t: t.update({A: t[A].flatten()}), r"lora_A must be \[3, 16\], got \[48\]"),
    "integers": (lambda t: t.update({A: t[A].int()}), r"lora_A must have a floating-point dtype, got torch\.int32"),
    "unknown layer": (lambda t: t.update({A.replace("q_proj", "z"): t[A].clone()}), r"self_attn\.z: not a layer"),
    "embedding": (lambda t: t.update({f"{PREFIX}model.norm.lora_A.weight": t[A].clone()}), r"model\.norm: not a layer"),
    "no factor": (
        lambda t: t.update({f"{PREFIX}{Q0}.lora_magnitude_vector": t[A].clone()}),
        "lora_magnitude_vector, which",
    ),
    "base weight": (lambda t: t.update({f"{PREFIX}lm_head.weight": t[A].clone()}), r"a tensor lm_head\.weight, which"),
    "no prefix": (lambda t: t.update({"lm_head.weight": t[A].clone()}), r"must begin with 'base_model\.model\.'"),
}


@pytest.mark.parametrize("into", ["the base", "adapters"])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_leave_the_model_untouched(case, into, tmp_path):
    change, message = BAD_TENSORS[case]
    small_llama_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = llama()
    if into == "adapters":
        adapted(model, target_modules=["q_proj", "v_proj"])
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert photograph(model) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, f"{Q0} has r=4 in the model and r=3 in the file"),
        ({"target_modules": ["q_proj"]}, "it adapts .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "no lora_A and lora_B for .*k_proj"),
        ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}, r"no tensor lm_head\.weight"),
    ],
)
def test_adapters_of_another_make_are_left_untouched(arguments, message, tmp_path):
    small_llama_adapter(tmp_path)
    model = adapted(llama(), **arguments)
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert photograph(model) == before


def test_another_model_is_left_untouched(tmp_path):
    small_llama_adapter(tmp_path)
    for model in (bert(), llama(hidden_size=32), llama(num_hidden_layers=1)):
        before = photograph(model)
        with pytest.raises(ValueError, match="does not fit the model"):
            load_adapter(model, tmp_path)
        assert photograph(model) == before


def test_a_module_saved_whole_must_fit(tmp_path):
    save_adapter(adapted(bert(), modules_to_save=["classifier"]), tmp_path)
    model = transformer("Bert", "ForSequenceClassification", num_labels=5)
    before = photograph(model)
    with pytest.raises(ValueError, match=r"classifier\.weight must be \[5, 16\], got \[3, 16\]"):
        load_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{PREFIX}classifier.bias"] = tensors[f"{PREFIX}classifier.bias"].int()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"classifier\.bias must be torch\.float32 or alike, got torch\.int32"):
        load_adapter(bert(), tmp_path)
    assert photograph(model) == before


HEAD = {"modules_to_save": ["lm_head"]}
ALONE = "lm_head is in modules_to_save of the {} only"
LACKS, ASTRAY = (
    r"no tensor lm_head\.weight, which is in modules_to_save",
    r"a tensor lm_head\.weight, which belongs to no",
)


@pytest.mark.parametrize(
    "model_saves, file, message",
    [
        (None, "lacks the tensor", [LACKS]),
        ({}, "lacks the tensor", [ALONE.format("file"), LACKS]),
        (HEAD, "lacks the tensor", [LACKS]),
        ({}, "is whole", [ALONE.format("file")]),
        (None, "does not declare it", [ASTRAY]),
        ({}, "does not declare it", [ASTRAY]),
        (HEAD, "does not declare it", [ALONE.format("model")]),
    ],
)
def test_what_the_config_saves_whole_is_in_the_file_and_no_more(model_saves, file, message, tmp_path):
    targets = {"target_modules": ["q_proj", "v_proj"]}
    save_adapter(adapted(llama(), **targets, **HEAD), tmp_path)
    if file == "lacks the tensor":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        del tensors[f"{PREFIX}lm_head.weight"]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    elif file == "does not declare it":
        edit_config(tmp_path, modules_to_save=None)
    model = llama() if model_saves is None else adapted(llama(), **targets, **model_saves)
    before = photograph(model)
    with pytest.raises(ValueError, match="; .*".join(message)):
        load_adapter(model, tmp_path)
    assert photograph(model) == before


def test_layers_that_cannot_be_adapted_are_named(tmp_path):
    small_llama_adapter(tmp_path)
    model = llama()
    layer = model.get_submodule(Q0)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=rf"{Q0}: Linear with a uint8 weight \(quantized\)"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="already has PEFT adapters"):
        load_adapter(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ValueError, match="on the meta device"):
        load_adapter(llama().to("meta"), tmp_path)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        load_adapter("model", tmp_path)


def test_broken_and_missing_files(tmp_path):
    good, model = tmp_path / "good", llama()
    before = photograph(model)
    small_llama_adapter(good)

    def copy_without(name, *wanted):
        folder = tmp_path / name
        folder.mkdir()
        for file in wanted:
            (folder / file).write_bytes((good / file).read_bytes())
        return folder

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*nowhere"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"no {config}"):
        load_adapter(model, copy_without("no config", weights))
    no_weights = copy_without("no weights", config)
    with pytest.raises(FileNotFoundError, match=f"no {weights}"):
        load_adapter(model, no_weights)
    torch.save(load_file(good / weights), no_weights / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*could run code"):
        load_adapter(model, no_weights)

    pickled = copy_without("pickled", config)
    torch.save(load_file(good / weights), pickled / weights)
    with pytest.raises(ValueError, match=r"is no \(whole\) safetensors file"):
        load_adapter(model, pickled)
    (pickled / weights).write_bytes((good / weights).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is no \(whole\) safetensors file"):
        load_adapter(model, pickled)

    broken = copy_without("broken", weights)
    for text, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("\xff", "not valid JSON")):
        (broken / config).write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, broken)
    assert photograph(model) == before


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_adapter_and_nothing_else(tmp_path):
    small_llama_adapter(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    model = adapted(llama(), r=2)
    save_adapter(model, str(tmp_path))
    assert sorted(contents(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    fresh = llama()
    load_adapter(fresh, str(tmp_path))
    assert torch.equal(logits(fresh), logits(model))
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert len(modes) == 1, "all as the umask says"


def test_what_cannot_be_saved(tmp_path):
    target = tmp_path / "adapter"
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(llama(), target)
    with pytest.raises(ValueError, match="itself a FusedALLoRALinear"):
        save_adapter(FusedALLoRALinear(4, 4, r=2), target)
    model = adapted(llama(), target_modules=["q_proj"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a folder, but .* is a file"):
        save_adapter(model, tmp_path / "file")
    layer = model.get_submodule(Q0)
    layer.eta = 3.0
    with pytest.raises(ValueError, match=r"one \(eta, norm\) for all layers.*\(2\.0, 'row'\), \(3\.0, 'row'\)"):
        save_adapter(model, target)
    layer.eta = 2.0
    full = layer.lora_A.data
    layer.lora_A.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"{Q0}\.lora_A is \[0\] and not \[3, 16\]: gather"):
        save_adapter(model, target)
    layer.lora_A.data = full
    layer.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        save_adapter(model, target)
    assert not target.exists()


def test_saving_warns_of_what_the_files_cannot_hold(tmp_path):
    model = adapted(llama(), target_modules=["q_proj"])
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"trained but not saved.*model\.norm\.weight"):
        save_adapter(model, tmp_path)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)

    model = Twice()
    apply_allora(model, r=2)
    with pytest.warns(UserWarning, match="under their first name only: a"):
        save_adapter(model, tmp_path)
    fresh = Twice()
    load_adapter(fresh, tmp_path)
    assert fresh.a is fresh.b and torch.equal(fresh.a.lora_A, model.a.lora_A)


def test_an_ordinary_save_and_load_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        small_llama_adapter(tmp_path)
        load_adapter(llama(), tmp_path)
