"""QLoRA as people write it with PEFT and a Trainer, by ALLoRA's rule and accelerated, on models that transformers quantizes."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from tiny_models import VOCAB, llama, logits, randomised
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

from allora_kernels import load_adapter
from allora_kernels.integrations.peft import (
    accelerate_lora,
    explain,
    get_allora_model,
    load_allora_model,
    restore_lora,
)
from allora_kernels.layer import bases, quantized

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
SETTINGS = ["4bit", "8bit", "int8"]
settings = pytest.mark.parametrize("setting", SETTINGS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'"),
    pytest.mark.filterwarnings("ignore:Merge lora|Unmerge lora"),
]


def quantization(setting):
    if setting == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[quantized]'")
        from torchao.quantization import Int8WeightOnlyConfig

        if Version(peft.__version__) < Version("0.19"):
            pytest.skip("this PEFT knows none of the weights of torchao >= 0.18")
        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")
    return BitsAndBytesConfig(**(FOUR_BIT if setting == "4bit" else {"load_in_8bit": True}))


@pytest.fixture
def base(tmp_path):
    """A folder with a saved model."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base, setting):
    """In training mode: in the other, 8-bit layers round x too, and 4-bit ones pack their weights on some CPUs."""
    config = quantization(setting)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).train()


def lora(alpha=4, **others):
    return LoraConfig(**{"r": 4, "lora_alpha": alpha, "target_modules": ["q_proj", "up_proj"], **others})


def batch():
    return torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))


def train(model, folder, **others):
    """The losses of a Trainer's steps."""
    arguments = TrainingArguments(
        str(folder), learning_rate=0.02, per_device_train_batch_size=8, report_to="none", disable_tqdm=True,
        use_cpu=True, seed=0, logging_steps=1, lr_scheduler_type="constant", **others,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in batch()])
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@settings
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_the_usual_script_trains_saves_and_resumes(base, setting, checkpointing, tmp_path):
    model = prepare_model_for_kbit_training(load(base, setting), use_gradient_checkpointing=checkpointing)
    model = get_allora_model(model, lora(target_modules="all-linear"), 0.7, "token")
    report = explain(model)
    assert len(report.ours) == 14 and not report.pefts and " computes y and dx" in str(report)
    losses = train(model, tmp_path / "run", max_steps=8, save_steps=4)
    assert losses[-1] < losses[0] - 0.1
    assert not (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()

    model.save_pretrained(tmp_path / "adapter")
    after = logits(model.train())
    plain = PeftModel.from_pretrained(prepared(base, setting), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(plain).float(), after.float(), rtol=0.02, atol=0.02)
    resumed = load_allora_model(prepared(base, setting), tmp_path / "adapter", is_trainable=True).train()
    assert torch.equal(logits(resumed), after) and explain(resumed) == report
    own = prepared(base, setting)
    load_adapter(own, tmp_path / "adapter")
    torch.testing.assert_close(logits(own.train()), after, rtol=0, atol=0)


def prepared(base, setting):
    return prepare_model_for_kbit_training(load(base, setting), use_gradient_checkpointing=False)


@settings
def test_a_run_goes_on_accelerated(base, setting, tmp_path):
    model = randomised(peft.get_peft_model(load(base, setting), lora(alpha=10)))
    for module in model.modules():
        bases.keep_backward(module)
    plain = train(model, tmp_path / "plain", max_steps=4)
    randomised(model)
    assert len(accelerate_lora(model).ours) == 4
    fused = train(model, tmp_path / "fused", max_steps=4)
    assert fused == pytest.approx(plain, rel=0.02) and fused[-1] < fused[0]
    restore_lora(model)
    assert not explain(model).ours


def test_the_kernels_take_over_the_usual_4bit_script(base, monkeypatch):
    """Under Trainer's bf16, after prepare_model_for_kbit_training, whose norms give the layers an x in float32."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(quantized, "DEQUANTIZED_FROM_ROWS", 1)
    model = randomised(peft.get_peft_model(prepared(base, "4bit"), lora(alpha=10)))
    for module in model.modules():
        bases.keep_backward(module)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch(), labels=batch()).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        return loss, *torch.autograd.grad(loss, trained)

    by_peft = step()
    assert len(accelerate_lora(model).ours) == 4
    monkeypatch.setattr(quantized, "add_adapter", None)
    for ours, theirs in zip(step(), by_peft):
        assert ours.dtype == theirs.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


@settings
def test_merging_is_pefts(base, setting):
    """PEFT quantizes the sum again, and knows how from the model's quantization config."""
    stock = randomised(peft.get_peft_model(load(base, setting), lora(alpha=10)))
    for module in stock.modules():
        bases.keep_backward(module)
    ours = copy.deepcopy(stock)
    accelerate_lora(ours)
    found = []
    for model in (stock, ours):
        model.merge_adapter()
        on = logits(model)
        model.unmerge_adapter()
        found.append((on, logits(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    torch.testing.assert_close(found[1][1].float(), found[0][1].float(), rtol=0.02, atol=0.02)
    assert (found[0][0] - logits(load(base, setting))).norm() > 0.1
