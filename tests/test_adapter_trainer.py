"""A user's own Trainer: checkpoints hold the adapters, resuming gives the same bits, the best model comes back."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_models import pretend_to_train  # noqa: E402
from tiny_training import make_model, same, trained  # noqa: E402
from torch import nn  # noqa: E402

from allora_kernels import (  # noqa: E402
    adapter_layers,
    adapter_parameters,
    add_adapter,
    apply_allora,
    load_adapter,
    merge_adapter,
    set_adapter,
)
from allora_kernels.training import AdapterCheckpoints, AdapterTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = {
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), "Bert")


def rows():
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(3, 25, (32, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in made]


def arguments(output, **changes):
    settings = dict(
        output_dir=str(output), per_device_train_batch_size=4, max_steps=8, save_steps=3, logging_steps=1, seed=0,
        learning_rate=0.02, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**(settings | changes))


def trainer(base, output, cls=AdapterTrainer, tokenizer=False, **changes):
    transformers.set_seed(0)
    # Dropout is on: what draws random numbers is what resuming can get wrong.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    apply_allora(model, r=2, modules_to_save=["classifier"])
    own = {key: changes.pop(key) for key in ("compute_metrics", "callbacks") if key in changes}
    processing = transformers.AutoTokenizer.from_pretrained(base) if tokenizer else None
    return cls(
        model=model, args=arguments(output, **changes), train_dataset=rows(), eval_dataset=rows(),
        processing_class=processing, data_collator=transformers.default_data_collator, **own,
    )  # fmt: skip


def names(folder):
    return {p.name for p in Path(folder).iterdir()}


class TheirTrainer(transformers.Trainer):
    """As those of other libraries, which do more when a checkpoint is saved."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        Path(self.args.output_dir, "model_card").write_text("theirs")


class OneLine(AdapterCheckpoints, TheirTrainer):
    pass


@pytest.mark.parametrize("cls", [AdapterTrainer, OneLine])
def test_checkpoints_hold_no_base_model(base, tmp_path, cls):
    made = trainer(base, tmp_path, cls, tokenizer=True)
    made.train()
    assert names(tmp_path / "checkpoint-6") == CHECKPOINT | TOKENIZER
    assert (tmp_path / "model_card").exists() == (cls is OneLine)
    config = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    made.save_model()
    assert names(tmp_path) >= {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} | TOKENIZER
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    load_adapter(fresh, tmp_path)
    assert same(trained(fresh), trained(made.model))


def test_what_a_plain_trainer_writes_is_small_too_and_is_not_misread(base, tmp_path):
    made = trainer(base, tmp_path, transformers.Trainer)
    made.train()
    assert names(tmp_path / "checkpoint-6") == CHECKPOINT
    with pytest.raises((ValueError, OSError)):
        made.train(resume_from_checkpoint=True)
    again = trainer(base, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(trained(again.model), trained(made.model))


@pytest.mark.parametrize("cls", [AdapterTrainer, OneLine])
def test_resuming_gives_the_same_bits(base, tmp_path, cls):
    whole = trainer(base, tmp_path, cls)
    whole.train()
    part = trainer(base, tmp_path, cls)
    pretend_to_train(part.model)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(trained(part.model), trained(whole.model))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (part, whole)]
    assert losses[0] == losses[1] and len(losses[1]) == 8


def test_the_best_model_comes_back(base, tmp_path):
    scores = iter([1.0, 5.0, 2.0, 3.0])
    made = trainer(
        base, tmp_path, compute_metrics=lambda _: {"score": next(scores)}, load_best_model_at_end=True,
        metric_for_best_model="score", eval_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=2,
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    load_adapter(best, tmp_path / "checkpoint-4")
    last = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    load_adapter(last, tmp_path / "checkpoint-8")
    assert same(trained(made.model), trained(best)) and not same(trained(best), trained(last))


def test_a_model_that_is_not_of_transformers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, input_ids, labels):
            logits = self.head(self.linear(input_ids / 25.0))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def make():
        model = Net()
        apply_allora(model, r=2, target_modules=["linear"], modules_to_save=["head"])
        return AdapterTrainer(
            model=model, args=arguments(tmp_path), train_dataset=rows(),
            data_collator=transformers.default_data_collator,
        )  # fmt: skip

    whole, part = make(), make()
    whole.train()
    assert names(tmp_path / "checkpoint-3") == CHECKPOINT
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(trained(part.model), trained(whole.model))


def test_a_checkpoint_of_other_adapters_or_none_is_an_error(base, tmp_path):
    made = trainer(base, tmp_path)
    made.train()
    other = trainer(base, tmp_path / "other")
    merge_adapter(other.model)
    apply_allora(other.model, r=3)
    before = trained(other.model)
    with pytest.raises(ValueError, match="does not fit the model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError)):
        other.train(resume_from_checkpoint=str(tmp_path / "empty"))
    assert same(trained(other.model), before)


def test_what_it_cannot_do_is_refused_at_once(base, tmp_path, monkeypatch):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(ValueError, match="no adapters: apply_allora"):
        AdapterTrainer(model=model, args=arguments(tmp_path))
    apply_allora(model, r=2)
    create = transformers.Trainer.create_accelerator_and_postprocess
    for engine in ("fsdp", "deepspeed"):

        def with_engine(self, engine=engine):
            create(self)
            setattr(self, f"is_{engine}_enabled", True)

        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_engine)
            with pytest.raises(ValueError, match=rf"(?i){engine} is on.*save_adapter"):
                AdapterTrainer(model=model, args=arguments(tmp_path))
    synced = arguments(tmp_path)
    synced.sync_ref_model = True  # As TRL's arguments have it.
    with pytest.raises(ValueError, match=r"\(sync_ref_model=False\)"):
        AdapterTrainer(model=model, args=synced)
    assert len(adapter_layers(model)) > 0
    peft = pytest.importorskip("peft")
    over = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["base_layer", "query"]))
    with pytest.raises(ValueError, match=r"PEFT's LoraModel is around the adapted model.*leave peft_config out"):
        AdapterTrainer(model=over, args=arguments(tmp_path))


def test_of_several_adapters_a_trainer_takes_the_one_that_it_names(base, tmp_path):
    def several(cls, output, **changes):
        transformers.set_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        apply_allora(model, r=2, modules_to_save=["classifier"], adapter_name="a")
        add_adapter(model, "b", r=3)
        set_adapter(model, "b")
        own = dict(train_dataset=rows(), data_collator=transformers.default_data_collator)
        return cls(model=model, args=arguments(output, **changes), **own)

    class OfB(AdapterTrainer):
        adapter = "b"

    with pytest.raises(ValueError, match="has adapters 'a', 'b', and a checkpoint holds one"):
        several(AdapterTrainer, tmp_path / "none")
    whole = several(OfB, tmp_path / "whole")
    before = {name: [p.detach().clone() for p in adapter_parameters(whole.model, name)] for name in "ab"}
    whole.train()
    for name, moved in (("a", False), ("b", True)):
        after = adapter_parameters(whole.model, name)
        assert all(torch.equal(p, was) != moved for p, was in zip(after, before[name], strict=True))
    again = several(OfB, tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same(trained(again.model), trained(whole.model))
