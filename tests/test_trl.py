"""TRL's trainers on a PeftModel with our layers and on a model of our own: they train, stop and go on, and keep the base."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
pytest.importorskip("peft")

import peft
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import pretend_to_train
from tiny_training import LETTERS, make_model, same, trained
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from allora_kernels import adapter_layers, apply_allora, load_adapter
from allora_kernels.integrations.peft import ALLoRALinear, get_allora_model, load_allora_model
from allora_kernels.training import AdapterCheckpoints

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WEIGHTS = {"adapter_config.json", "adapter_model.safetensors"}


class OurSFT(AdapterCheckpoints, SFTTrainer):
    pass


class OurDPO(AdapterCheckpoints, DPOTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), "Llama")


def load(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def in_peft(base, **settings):
    transformers.set_seed(0)
    return get_allora_model(load(base), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), **settings)


def applied(base, **settings):
    transformers.set_seed(0)
    model = load(base)
    apply_allora(model, r=4, **settings)
    return model


def texts():
    return [" ".join(LETTERS[(i + j) % 20] for j in range(8)) for i in range(16)]


def rows(trainer):
    """Texts for SFT; for DPO, the text going on in order over one that does not."""
    if issubclass(trainer, SFTTrainer):
        return Dataset.from_dict({"text": texts()})
    halves = [(text[:12], text[12:]) for text in texts()]
    return Dataset.from_dict(
        {"prompt": [a for a, _ in halves], "chosen": [b for _, b in halves], "rejected": [" w3 w1 w9"] * len(halves)}
    )


def make(trainer, model, base, output, callbacks=(), **changes):
    settings = dict(
        output_dir=str(output), per_device_train_batch_size=4, max_steps=8, save_steps=3, logging_steps=1, seed=0,
        learning_rate=0.02, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, max_length=16,
        bf16=False,
    )  # fmt: skip
    config = SFTConfig if issubclass(trainer, SFTTrainer) else DPOConfig
    data = rows(trainer)
    return trainer(
        model=model, args=config(**(settings | changes)), train_dataset=data, eval_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(base), callbacks=list(callbacks),
    )  # fmt: skip


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(3, 17).view(2, 7)).logits


def assert_base_is_untouched(model, base):
    frozen = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items()}
    names = {name.removeprefix("base_model.model.") for name in frozen}
    kept = load(base).state_dict()
    assert kept.keys() <= names
    for name, t in frozen.items():
        if name.removeprefix("base_model.model.") in kept:
            assert torch.equal(t, kept[name.removeprefix("base_model.model.")]), name


KINDS = {
    "peft-sft": (in_peft, SFTTrainer),
    "applied-sft": (applied, OurSFT),
    "peft-dpo": (in_peft, DPOTrainer),
    "applied-dpo": (applied, OurDPO),
}
kinds = pytest.mark.parametrize(("adapt", "trainer"), KINDS.values(), ids=KINDS.keys())


class Count(transformers.TrainerCallback):
    steps = 0

    def on_step_end(self, *_, **__):
        self.steps += 1


@kinds
@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_checkpointing": False}], ids=["bf16", "float32"])
def test_the_loss_falls_and_the_base_stays(base, tmp_path, adapt, trainer, changes):
    """As TRL has it by default, which is with checkpointing and bfloat16 autocast; and with neither."""
    count = Count()
    made = make(trainer, adapt(base), base, tmp_path, callbacks=[count], **changes)
    assert made.args.gradient_checkpointing is made.args.bf16
    made.train()
    losses = logged(made)
    assert count.steps == len(losses) == 8
    assert losses[-1] < losses[0] * 0.9
    assert math.isfinite(made.evaluate()["eval_loss"])
    assert_base_is_untouched(made.model, base)
    saved = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert saved >= WEIGHTS and not any("model.safetensors" in name for name in saved - WEIGHTS)


@kinds
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(base, tmp_path, adapt, trainer):
    whole = make(trainer, adapt(base), base, tmp_path)
    whole.train()
    part = make(trainer, adapt(base), base, tmp_path)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(trained(part.model), trained(whole.model))
    assert logged(part) == logged(whole)


@kinds
def test_what_it_writes_is_loaded_by_us_and_by_peft(base, tmp_path, adapt, trainer):
    made = make(trainer, adapt(base), base, tmp_path / "run")
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    expected = logits(made.model)
    assert not torch.equal(expected, logits(load(base)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["allora_eta"], config["allora_norm"]) == (2.0, "row")
    ours, stock = load(base), PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    resumed = load_allora_model(load(base), tmp_path / "adapter", is_trainable=True)
    for model in (ours, stock, resumed):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
def test_without_a_rule_it_is_pefts_own_training(base, tmp_path, trainer):
    transformers.set_seed(0)
    plain = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    fused = in_peft(base, norm=None)
    assert sum(isinstance(m, ALLoRALinear) for m in fused.modules()) == 14
    runs = [make(trainer, model, base, tmp_path / str(i)) for i, model in enumerate((plain, fused))]
    for run in runs:
        run.train()
    torch.testing.assert_close(logged(runs[1]), logged(runs[0]), rtol=1e-5, atol=1e-6)


def test_the_rule_reaches_the_gradients(base, tmp_path):
    runs = [make(SFTTrainer, in_peft(base, norm=norm), base, tmp_path / str(norm)) for norm in ("row", None)]
    for run in runs:
        run.train()
    assert logged(runs[0])[0] == logged(runs[1])[0] and logged(runs[0])[-1] != logged(runs[1])[-1]


def test_both_kinds_of_model_train_alike(base, tmp_path):
    one, other = (
        make(SFTTrainer, in_peft(base), base, tmp_path / "a"),
        make(OurSFT, applied(base), base, tmp_path / "b"),
    )
    layers = adapter_layers(other.model)
    for name, layer in layers.items():
        theirs = one.model.get_submodule(f"base_model.model.{name}")
        layer.lora_A.data.copy_(theirs.lora_A["default"].weight)
    one.train(), other.train()
    torch.testing.assert_close(logged(one), logged(other), rtol=1e-5, atol=1e-6)


def test_the_best_model_comes_back(base, tmp_path):
    made = make(
        OurSFT, applied(base), base, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_steps=2, learning_rate=0.5,
    )  # fmt: skip
    made.train()
    losses = logged(made, "eval_loss")
    best = 2 * (losses.index(min(losses)) + 1)
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = load(base)
    load_adapter(kept, tmp_path / f"checkpoint-{best}")
    assert same(trained(made.model), trained(kept))


# --- DPO's reference ------------------------------------------------------------------------------------------------


def reference_log_probs(made):
    """[2, batch]: of the first batch, as the trainer itself computes them."""
    inputs = made._prepare_inputs(next(iter(made.get_eval_dataloader())))
    policy = made.model if made.ref_model is None else made.ref_model
    return torch.stack(made.compute_ref_log_probs(policy, inputs))


@pytest.mark.parametrize(("adapt", "trainer"), [(in_peft, DPOTrainer), (applied, OurDPO)], ids=["peft", "applied"])
def test_the_reference_is_the_frozen_model_also_after_training(base, tmp_path, adapt, trainer):
    made = make(trainer, adapt(base), base, tmp_path)
    before = reference_log_probs(made)
    made.train()
    losses, margins = logged(made), logged(made, "rewards/margins")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and margins[0] == 0
    assert margins[-1] > 0.1
    assert torch.equal(reference_log_probs(made), before)
    frozen = make(DPOTrainer, load(base), base, tmp_path)
    torch.testing.assert_close(before, reference_log_probs(frozen), rtol=1e-6, atol=1e-6)


def test_reference_log_probs_computed_beforehand_need_no_second_model(base, tmp_path):
    made = make(OurDPO, applied(base), base, tmp_path / "a")
    made.train()
    beforehand = make(OurDPO, applied(base), base, tmp_path / "b", precompute_ref_log_probs=True)
    beforehand.train()
    assert made.ref_model is not None and beforehand.ref_model is None
    torch.testing.assert_close(logged(beforehand), logged(made), rtol=1e-5, atol=1e-6)


# --- what cannot be right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [OurSFT, OurDPO])
def test_an_adapter_that_trl_would_pass_by_is_refused(base, tmp_path, trainer):
    model = applied(base, target_modules=["q_proj", "lm_head"])
    assert "lm_head" in adapter_layers(model)
    with pytest.raises(ValueError, match=r"lm_head has an adapter.*leave the head out of target_modules"):
        make(trainer, model, base, tmp_path)


def test_a_trainer_without_our_checkpoints_writes_the_adapter_and_does_not_misread_it(base, tmp_path):
    made = make(SFTTrainer, applied(base), base, tmp_path)
    made.train()
    assert {p.name for p in (tmp_path / "checkpoint-3").iterdir()} >= WEIGHTS
    again = pretend_to_train(applied(base))
    with pytest.raises((ValueError, OSError)):
        make(SFTTrainer, again, base, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
def test_nor_does_it_pass_by_an_adapter_on_the_head(base, tmp_path, trainer):
    model = applied(base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(RuntimeError, match=r"lm_head has an adapter, but .* forward pass did not call it"):
        make(trainer, model, base, tmp_path).train()


# --- the examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo"])
def test_the_example(name, base, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module(name)
    before, after = example.finetune(base, tmp_path, texts(), texts()[:4], steps=8, learning_rate=0.02)
    assert after < before
    assert isinstance(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter"), PeftModel)
