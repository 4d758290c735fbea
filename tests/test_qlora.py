"""A quantized model trains end to end: adapted, trained, saved, loaded, and the adapter merged into the base as it was."""

import importlib
import inspect
import os
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, llama, logits, photograph
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from allora_kernels import (
    WrappedALLoRALinear,
    adapter_layers,
    adapter_parameters,
    apply_allora,
    disable_adapters,
    explain,
    load_adapter,
    merge_adapter,
    save_adapter,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SETTINGS = {"4bit": {**FOUR_BIT, "bnb_4bit_compute_dtype": torch.bfloat16}, "8bit": {"load_in_8bit": True}}
settings = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture
def base(tmp_path):
    """A folder with a saved model."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base, setting):
    """In training mode: in the other, 8-bit layers round x too, and 4-bit ones pack their weights on some CPUs."""
    config = BitsAndBytesConfig(**SETTINGS[setting])
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).train()


def batch():
    return torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))


def train(model, steps=12):
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@settings
def test_a_quantized_model_trains_and_its_adapter_goes_to_any_base(base, setting, tmp_path):
    model = load(base, setting)
    before = logits(model)
    report = apply_allora(model, r=4)
    kind = {"4bit": "bitsandbytes Linear4bit", "8bit": "bitsandbytes Linear8bitLt"}[setting]
    assert set(report.bases.values()) == {
        kind
    } and f"2 x model.layers.*.self_attn.q_proj [64, 64], r=4, on {kind}" in str(report)
    assert report.trainable == sum(p.numel() for p in adapter_parameters(model))
    assert report.total - report.trainable == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters()
    )
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
    assert torch.equal(logits(model), before)
    table = explain(model)
    assert table.summary == "0 of 14 adapted layers fused; 1 linear layers without an adapter"
    why = {"4bit": "", "8bit": " (it is not known to multiply by a dequantized weight)"}[setting]
    assert f"q_proj [64, 64], r=4, not fused: {kind} computes y and dx{why}, the adapter is added by eager" in str(
        table
    )

    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    with disable_adapters(model):
        assert torch.equal(logits(model), before)

    save_adapter(model, tmp_path / "adapter")
    again = load(base, setting)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), before)

    whole = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(whole, tmp_path / "adapter")
    adapted = logits(whole)
    torch.testing.assert_close(logits(merge_adapter(whole)), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - logits(model)).norm() < 0.2 * adapted.norm()


@settings
def test_stock_peft_loads_it_on_the_quantized_base(base, setting, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(base, setting)
    apply_allora(model, r=4)
    train(model, 2)
    save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(load(base, setting), tmp_path / "adapter")
    torch.testing.assert_close(logits(wrapped).float(), logits(model).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_it(base, tmp_path, checkpointing):
    model = load(base, "4bit")
    apply_allora(model, r=4)
    # transformers has renamed it.
    known = (f"{kind}_checkpointing" for kind in ("activation", "gradient"))
    name = next(name for name in known if name in inspect.signature(TrainingArguments).parameters)
    arguments = TrainingArguments(
        tmp_path / "runs", max_steps=6, learning_rate=2e-2, per_device_train_batch_size=8, save_steps=3, logging_steps=1,
        report_to=[], use_cpu=True, lr_scheduler_type="constant", **{name: checkpointing},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in batch()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    saved = os.listdir(tmp_path / "runs" / "checkpoint-3")
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_the_example(base, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module("qlora")
    ids = torch.arange(12).repeat(8, 1) + torch.arange(8)[:, None]
    before, after = example.finetune(base, tmp_path / "adapter", ids, ids[:2], steps=16)
    assert after < before and "on bitsandbytes Linear4bit" in capsys.readouterr().out
    load_adapter(example.load_in_4_bits(base), tmp_path / "adapter")


def test_merging_into_a_quantized_model_is_refused(base):
    model = load(base, "4bit")
    apply_allora(model, r=4)
    names = dict(model.named_modules()).keys()
    with pytest.raises(
        ValueError, match=r"q_proj: bitsandbytes Linear4bit cannot hold W \+ BA.*load the model without quanti"
    ):
        merge_adapter(model)
    assert dict(model.named_modules()).keys() == names


def test_quantized_and_plain_layers_side_by_side(base):
    config = BitsAndBytesConfig(**FOUR_BIT, llm_int8_skip_modules=["up_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    report = apply_allora(model, r=4, exclude_modules=["v_proj"])
    kinds = {name.rpartition(".")[2]: type(layer).__name__ for name, layer in adapter_layers(model).items()}
    assert kinds["q_proj"] == "WrappedALLoRALinear" and kinds["up_proj"] == "FusedALLoRALinear"
    assert "v_proj" not in kinds and report.skipped["model.layers.0.self_attn.v_proj"] == "in exclude_modules"
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.3


def test_an_error_leaves_a_quantized_model_as_it_was(base):
    model = load(base, "4bit")
    before = photograph(model)
    with pytest.raises(ValueError, match="matches none of the layers"):
        apply_allora(model, r=4, rank_pattern={"nothing": 2})
    assert photograph(model) == before
    with pytest.raises(ValueError, match=r"use WrappedALLoRALinear\(linear\)"):
        apply_allora(model.model.layers[0].self_attn.q_proj)


def test_a_model_quantized_by_torchao_trains(tmp_path):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install '.[quantized]'"
    )
    model = llama(hidden_size=64, intermediate_size=128)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    report = apply_allora(model, r=4)
    assert set(report.bases.values()) == {"torchao Int8Tensor"} and len(report.bases) == 14
    assert all(isinstance(layer, WrappedALLoRALinear) for layer in adapter_layers(model).values())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.3
    save_adapter(model, tmp_path / "adapter")
    again = llama(hidden_size=64, intermediate_size=128)
    quantization.quantize_(again.model, quantization.Int8WeightOnlyConfig())
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
