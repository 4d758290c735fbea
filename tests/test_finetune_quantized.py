"""`finetune` over a base model in 4 or 8 bits: it learns, it resumes, and several runs share one."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")

from safetensors.torch import load_file  # noqa: E402
from test_finetune import ctrl_c, outcome  # noqa: E402
from tiny_training import At, make_model, sentences, switch_dropout_off, write_csv  # noqa: E402

from allora_kernels import FusedALLoRALinear, load_adapter  # noqa: E402
from allora_kernels.layer import quantized  # noqa: E402
from allora_kernels.models.adapted import adapter_layers, saved_modules  # noqa: E402
from allora_kernels.training import FinetuneConfig, base_model, finetune, finetune_together  # noqa: E402
from allora_kernels.training.config import without_none  # noqa: E402
from allora_kernels.training.dry_run import dry_run  # noqa: E402
from allora_kernels.training.preparing import prepare  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("classification", "causal-lm")
LAYERS = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}
each = [pytest.mark.parametrize("task", TASKS), pytest.mark.parametrize("bits", LAYERS)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = {task: make_model(folder / task, family) for task, family in zip(TASKS, ("Bert", "Llama"))}
    # Dropout draws from one stream for all runs that share a model.
    switch_dropout_off(models["classification"])
    return models, write_csv(folder / "data.csv", sentences())


@pytest.fixture
def settings(inputs, tmp_path):
    def make(task="causal-lm", quantize="4bit", **changes):
        models, data = inputs
        short = dict(model=models[task], data=data, output=str(tmp_path / "run"), task=task, r=4, learning_rate=0.02)
        short |= dict(batch_size=8, max_length=16, max_steps=12, save_steps=5, quantize=quantize)
        return FinetuneConfig(**(short | changes))

    return make


@each[0]
@each[1]
def test_it_learns(settings, task, bits):
    config = settings(task, bits, max_steps=40)
    metrics = finetune(config)
    assert metrics["after"]["loss"] < 0.9 * metrics["before"]["loss"] and metrics["config"]["quantize"] == bits
    # The adapter is of the model, whichever way its weights are stored.
    kind = "AutoModelForSequenceClassification" if task == "classification" else "AutoModelForCausalLM"
    base = getattr(transformers, kind).from_pretrained(config.model)
    load_adapter(base, Path(config.output, "adapter"))


@each[0]
@each[1]
def test_the_inner_linear_layers_are_quantized_and_the_heads_are_not(settings, task, bits):
    prepared = prepare(settings(task, bits, bf16=True))
    layers = adapter_layers(prepared.model)
    # This checkpoint has a pooler.
    assert type(layers.pop("bert.pooler.dense", None)) is (
        FusedALLoRALinear if task == "classification" else type(None)
    )
    assert len(layers) == (12 if task == "classification" else 14)
    for layer in layers.values():
        assert type(layer.base_layer) is LAYERS[bits] and layer.lora_A.dtype == torch.float32
        assert bits == "8bit" or layer.base_layer.compute_dtype == torch.bfloat16
    assert len([m for m in prepared.model.modules() if type(m) is LAYERS[bits]]) == len(layers)
    heads = saved_modules(prepared.model)
    assert {*heads} == ({"classifier"} if task == "classification" else set())
    for head in heads.values():
        assert all(p.dtype == torch.float32 and p.requires_grad for p in head.parameters())


def test_a_pooler_that_the_checkpoint_lacks_is_a_head(settings, tmp_path):
    config = settings("classification", model=str(tmp_path / "without"))
    shutil.copytree(settings("classification").model, config.model)
    transformers.BertModel.from_pretrained(config.model, add_pooling_layer=False).save_pretrained(config.model)
    prepared = prepare(config)
    assert {*saved_modules(prepared.model)} == {"classifier", "bert.pooler.dense"}
    assert type(prepared.model.bert.pooler.dense) is torch.nn.Linear


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(settings, tmp_path):
    config = settings(warmup_steps=2)
    whole = finetune(replace(config, output=str(tmp_path / "whole")))
    assert finetune(config, callbacks=[At(7, ctrl_c)])["status"] == "interrupted"
    with pytest.raises(ValueError, match="quantize"):
        finetune(replace(config, resume=True, quantize=None))
    assert outcome(finetune(replace(config, resume=True))) == outcome(whole)
    files = [Path(folder, "adapter", "adapter_model.safetensors") for folder in (config.output, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@each[0]
def test_runs_over_one_base_are_the_single_runs(settings, task, tmp_path):
    runs = {"first": settings(task, output=str(tmp_path / "a")), "other": settings(task, r=2, eta=1.0, norm="token")}
    found = finetune_together(runs)
    for name, config in runs.items():
        single = finetune(replace(config, output=str(tmp_path / "single" / name)))
        for measure, value in single["after"].items():
            assert found[name]["after"][measure] == pytest.approx(value, rel=1e-4), (name, measure)
        want, got = (
            load_file(Path(folder, "adapter", "adapter_model.safetensors"))
            for folder in (tmp_path / "single" / name, config.output)
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_by_the_kernels(settings, monkeypatch, tmp_path):
    # On a CPU bitsandbytes' own product takes blocks of 64 weights for parts of rows.
    config = settings(max_steps=3, model=str(tmp_path / "wider"))
    shutil.copytree(settings().model, config.model)
    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=32)
    wider = transformers.AutoConfig.from_pretrained(config.model, **sizes)
    transformers.LlamaForCausalLM(wider).save_pretrained(config.model)
    eager = finetune(replace(config, output=str(tmp_path / "eager")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(quantized, "DEQUANTIZED_FROM_ROWS", 1)
    monkeypatch.setattr(quantized, "add_adapter", None)
    assert finetune(config)["after"]["loss"] == pytest.approx(eager["after"]["loss"], rel=1e-4)


def test_what_a_dry_run_says(settings):
    found, plain = dry_run(settings()), dry_run(settings(quantize=None))
    assert "on bitsandbytes Linear4bit" in str(found) and "nothing was written" in str(found)
    layers = adapter_layers(prepare(settings()).model).values()
    of_scales = 0
    for layer in layers:
        state = layer.base_layer.weight.quant_state
        of_scales += state.absmax.nbytes + state.state2.absmax.nbytes
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert found.weight_bytes == plain.weight_bytes - 4 * numbers + numbers // 2 + of_scales


@pytest.mark.parametrize("device, expected", [("cpu", None), ("cuda:1", {"": 1})])
def test_each_process_loads_on_the_device_that_the_trainer_takes(inputs, device, expected, monkeypatch):
    monkeypatch.setattr(base_model, "PartialState", lambda: SimpleNamespace(device=torch.device(device)))
    config = transformers.AutoConfig.from_pretrained(inputs[0]["causal-lm"])
    kind = transformers.AutoModelForCausalLM
    found = base_model._quantization("4bit", "causal-lm", kind, config, torch.bfloat16)
    assert found.get("device_map") == expected


def test_none_is_a_word_of_the_command_line_and_of_files(settings):
    as_written = {"norm": "none", "quantize": "none", "r": 4}
    assert without_none(as_written) == {"norm": None, "quantize": None, "r": 4}
    assert without_none({"quantize": "4bit"}) == {"quantize": "4bit"}


# --- what is refused, before anything is written --------------------------------------------------------------------


def test_unknown_bits(settings):
    with pytest.raises(ValueError, match="quantize must be one of 4bit, 8bit; got 'nf4'"):
        settings(quantize="nf4")


def test_without_the_library(settings, monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    _refused(settings(), r"quantize needs bitsandbytes: pip install '.\[quantized\]' in a checkout")


def test_a_checkpoint_that_is_quantized_already(settings, tmp_path):
    config = settings()
    folder = tmp_path / "quantized"
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, quantization_config=four_bit)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(config.model).save_pretrained(folder)
    _refused(replace(config, model=str(folder)), "it is quantized already: leave quantize out")
    layers = adapter_layers(prepare(replace(config, model=str(folder), quantize=None)).model)
    assert all(type(layer.base_layer) is LAYERS["4bit"] for layer in layers.values())


def _refused(config, match):
    with pytest.raises(ValueError, match=match):
        finetune(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    "bits, match",
    [
        (("8bit", "8bit"), "cannot have quantize '8bit', whose layers take one adapter: use '4bit'"),
        (("4bit", None), "have quantize '4bit' and None, which must be equal"),
    ],
)
def test_runs_that_cannot_share_a_base(settings, bits, match, tmp_path):
    runs = {f"run{i}": settings(quantize=b, output=str(tmp_path / f"run{i}")) for i, b in enumerate(bits)}
    with pytest.raises(ValueError, match=match):
        finetune_together(runs)
    assert not any((tmp_path / name).exists() for name in runs)
