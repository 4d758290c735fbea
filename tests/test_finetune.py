"""`finetune`: it learns, it measures what it says, it resumes to the same bits, and it keeps to its format."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from tiny_training import At, make_model, sentences, write_csv  # noqa: E402

from allora_kernels import load_adapter, reference  # noqa: E402
from allora_kernels.training import preparing  # noqa: E402
from allora_kernels.training import run as module  # noqa: E402
from allora_kernels.training.config import FinetuneConfig  # noqa: E402
from allora_kernels.training.run import finetune  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("classification", "causal-lm")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = {task: make_model(folder / task, family) for task, family in zip(TASKS, ("Bert", "Llama"))}
    return models, write_csv(folder / "data.csv", sentences())


@pytest.fixture
def settings(inputs, tmp_path):
    """A config of a run of 12 steps, one and a half epochs, for the task."""

    def make(task="classification", **changes):
        models, data = inputs
        short = dict(model=models[task], data=data, output=str(tmp_path / "run"), task=task, r=4, learning_rate=0.02)
        return FinetuneConfig(**(short | dict(batch_size=8, max_length=16, max_steps=12, save_steps=5) | changes))

    return make


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def outcome(metrics):
    """All of the metrics that must not depend on the machine's speed or on where the run is written."""
    timing = ("seconds", "tokens_per_second", "peak_memory_bytes", "config")
    return {key: value for key, value in metrics.items() if key not in timing}


def files(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*")} if Path(folder).exists() else set()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss_on_unseen_data(settings, task, optimizer):
    rate = 0.02 if optimizer == "adamw" else 0.3
    metrics = finetune(settings(task, optimizer=optimizer, learning_rate=rate, max_steps=40, weight_decay=0.01))
    assert metrics["after"]["loss"] < 0.9 * metrics["before"]["loss"]
    losses = [loss for _, loss in metrics["loss_history"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_classification_is_learnt(settings):
    metrics = finetune(settings(max_steps=200, batch_size=16, save_steps=1000))
    assert metrics["after"]["accuracy"] >= 0.9 > metrics["data"]["majority_accuracy"]


def test_what_a_run_writes(settings):
    config = settings(eval_fraction=0.25)
    metrics = finetune(config)
    output = Path(config.output)
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["config"] == config.as_json()
    assert metrics["status"] == "finished" and metrics["steps"] == 12
    assert metrics["versions"]["transformers"] == transformers.__version__
    assert metrics["device"]["backend"] == "eager" and metrics["device"]["type"] == "cpu"
    assert metrics["data"]["train_rows"] == 72 and metrics["data"]["eval_rows"] == 24
    assert metrics["data"]["labels"] == ["fresh", "rotten"]
    assert [step for step, _ in metrics["loss_history"]] == list(range(1, 13))
    assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 2**20
    assert set(metrics["before"]) == set(metrics["after"]) == {"loss", "accuracy"}
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert not [name for name in files(output) if Path(name).name.startswith(".")]


def test_tokens_are_counted_without_padding(settings):
    config = settings(max_steps=None, epochs=2)
    metrics = finetune(config)
    train, _ = preparing.read(config)
    assert metrics["tokens"] == 2 * sum(len(text.split()) for text in train.texts)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(settings):
    config = settings("causal-lm")
    metrics = finetune(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model).eval()
    load_adapter(model, Path(config.output, "adapter"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    _, evaluation = preparing.read(config)
    ids = [i for text in evaluation.texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert metrics["after"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["after"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_loads_elsewhere_with_the_same_results(settings, task, by_peft):
    """The saved adapter on a fresh base scores what the run said, in this library and in stock PEFT."""
    config = settings(task)
    metrics = finetune(config)
    adapter = Path(config.output, "adapter")
    kind = transformers.AutoModelForSequenceClassification if task == TASKS[0] else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(config.model)
    if by_peft:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    else:
        load_adapter(model, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    _, evaluation = preparing.read(config)
    rows = preparing.tokenize(evaluation, metrics["data"].get("labels"), tokenizer, 16)
    collate = preparing.collator(tokenizer, metrics["data"].get("labels"))
    with torch.no_grad():
        loss = model.eval()(**collate([rows[i] for i in range(len(rows))])).loss.item()
    assert loss == pytest.approx(metrics["after"]["loss"], rel=1e-5)
    assert abs(loss - metrics["before"]["loss"]) > 0.01


def test_the_classes_travel_with_the_adapter(settings):
    config = settings()
    finetune(config)
    adapter = Path(config.output, "adapter")
    base_config = transformers.AutoConfig.from_pretrained(adapter / "base_config.json")
    assert base_config.id2label == {0: "fresh", 1: "rotten"}
    assert base_config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize("task", TASKS)
def test_transformers_own_from_pretrained_takes_the_adapters_folder(settings, task):
    pytest.importorskip("peft")
    config = settings(task)
    finetune(config)
    kind = transformers.AutoModelForSequenceClassification if task == TASKS[0] else transformers.AutoModelForCausalLM
    adapter = Path(config.output, "adapter")
    base_config = transformers.AutoConfig.from_pretrained(adapter / "base_config.json")
    plain = kind.from_pretrained(adapter, config=base_config).eval()
    mine = kind.from_pretrained(config.model, config=base_config).eval()
    load_adapter(mine, adapter)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, mine(ids).logits, atol=1e-5)
    assert plain.config.id2label == base_config.id2label


def test_a_model_trained_for_the_same_classes_keeps_its_head(settings, tmp_path):
    config = settings()
    names = {"id2label": {0: "rotten", 1: "fresh"}, "label2id": {"rotten": 0, "fresh": 1}}
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(config.model, **names)
    trained.save_pretrained(tmp_path / "trained")
    transformers.AutoTokenizer.from_pretrained(config.model).save_pretrained(tmp_path / "trained")
    metrics = finetune(replace(config, model=str(tmp_path / "trained"), max_steps=1, learning_rate=1e-9))
    assert metrics["data"]["labels"] == ["rotten", "fresh"]
    saved = module.transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    load_adapter(saved, Path(config.output, "adapter"))
    assert torch.allclose(saved.classifier.weight, trained.classifier.weight, atol=1e-6)


def test_a_pooler_the_checkpoint_does_not_have_is_trained_and_saved(settings, tmp_path):
    config = settings(max_steps=3)
    model = transformers.BertModel.from_pretrained(config.model, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "no_pooler")
    transformers.AutoTokenizer.from_pretrained(config.model).save_pretrained(tmp_path / "no_pooler")
    finetune(replace(config, model=str(tmp_path / "no_pooler")))
    saved = json.loads(Path(config.output, "adapter", "adapter_config.json").read_text())["modules_to_save"]
    assert set(saved) == {"classifier", "bert.pooler.dense"}


def test_plain_text_is_trained_on_and_held_out_at_its_end(settings, tmp_path):
    text = tmp_path / "plays.txt"
    text.write_text("".join(f"{words}\n" for words, _ in sentences()))
    metrics = finetune(settings("causal-lm", data=str(text), max_steps=20))
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]


def test_evaluation_data_of_its_own(settings, tmp_path):
    other = write_csv(tmp_path / "other.csv", sentences(17))
    metrics = finetune(settings(eval_data=other, max_steps=1))
    assert (metrics["data"]["train_rows"], metrics["data"]["eval_rows"]) == (96, 17)


def test_unshuffled_data_is_taken_in_the_order_of_the_file(settings, tmp_path):
    rows = sentences(24)
    config = settings(data=write_csv(tmp_path / "train.csv", rows), eval_data=write_csv(tmp_path / "eval.csv", rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    seen = []

    class Spy(module.FinetuneTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
            return super().training_step(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "FinetuneTrainer", Spy)
        finetune(replace(config, shuffle=False, max_steps=3))
        assert seen == [text for text, _ in rows]
        seen.clear()
        finetune(replace(config, max_steps=3, output=str(tmp_path / "shuffled")))
        assert sorted(seen) == sorted(text for text, _ in rows) and seen != [text for text, _ in rows]


# --- the same again -------------------------------------------------------------------------------------------------


def test_the_seed_reproduces_and_another_seed_does_not(settings, tmp_path):
    config = settings()
    first, again = (finetune(replace(config, output=str(tmp_path / name))) for name in "ab")
    other = finetune(replace(config, output=str(tmp_path / "c"), seed=1))
    assert outcome(first) == outcome(again)
    assert other["loss_history"] != first["loss_history"]


@pytest.mark.parametrize("step", [3, 5, 8, 12])
@pytest.mark.parametrize("task", TASKS)
def test_ctrl_c_saves_and_resuming_gives_the_same_bits(settings, tmp_path, task, step):
    """Dropout is on in the classifier. Step 5 is a checkpoint anyway, 8 is past the first epoch's data order..."""
    config = settings(task, grad_accumulation=2, batch_size=4, warmup_steps=2, schedule="cosine")
    whole = finetune(replace(config, output=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGINT)
    stopped = finetune(config, callbacks=[At(step, ctrl_c)])
    assert signal.getsignal(signal.SIGINT) is before
    if step == 12:
        assert stopped["status"] == "finished"
    else:
        assert stopped["status"] == "interrupted" and stopped["steps"] == step and stopped["after"] is None
    assert Path(config.output, f"checkpoint-{step}", "trainer_state.json").exists()
    assert Path(config.output, "adapter", "adapter_model.safetensors").exists()
    resumed = finetune(replace(config, resume=True))
    assert outcome(resumed) == outcome(whole)
    same = [
        Path(run, "adapter", "adapter_model.safetensors").read_bytes() for run in (config.output, tmp_path / "whole")
    ]
    assert same[0] == same[1]


def test_a_resumed_run_saves_as_often_as_it_is_told(settings):
    config = settings(save_steps=100)
    finetune(config, callbacks=[At(2, ctrl_c)])
    finetune(replace(config, resume=True, save_steps=5), callbacks=[At(11, ctrl_c)])
    assert {p.name for p in Path(config.output).glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-11"}


def test_settings_that_a_run_did_not_have_yet_were_their_defaults(settings):
    config = settings("classification")
    former = {name: value for name, value in config.as_json().items() if name != "experts"}
    assert config.changed_since(former) == []
    assert replace(config, experts=True).changed_since(former) == ["experts"]


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_resumes(settings, tmp_path):
    config = settings()
    whole = finetune(replace(config, output=str(tmp_path / "whole")))

    def twice():
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        finetune(config, callbacks=[At(7, twice)])
    assert json.loads(Path(config.output, "metrics.json").read_text())["status"] == "running"
    assert outcome(finetune(replace(config, resume=True))) == outcome(whole)


def test_a_torn_checkpoint_is_passed_over(settings, tmp_path):
    config = settings()
    whole = finetune(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        finetune(config, callbacks=[At(11, lambda: (ctrl_c(), ctrl_c()))])
    state = Path(config.output, "checkpoint-10", "trainer_state.json")
    state.write_text(state.read_text()[:50])
    assert outcome(finetune(replace(config, resume=True))) == outcome(whole)


def test_a_run_killed_in_its_last_evaluation_trains_no_further(settings, monkeypatch, tmp_path):
    config = settings()
    whole = finetune(replace(config, output=str(tmp_path / "whole")))
    evaluate, calls = module.evaluate, []

    def killed_the_second_time(trainer):
        calls.append(trainer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(trainer)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "evaluate", killed_the_second_time)
        finetune(config)
    assert outcome(finetune(replace(config, resume=True))) == outcome(whole)


def test_a_finished_run_is_returned_as_it_is(settings):
    config = settings()
    metrics = finetune(config)
    kept = files(config.output)
    assert finetune(replace(config, resume=True)) == metrics
    assert files(config.output) == kept


def test_a_run_stopped_before_its_first_checkpoint_starts_over(settings, tmp_path):
    config = settings()
    whole = finetune(replace(config, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        finetune(config, callbacks=[At(2, lambda: (ctrl_c(), ctrl_c()))])
    assert outcome(finetune(replace(config, resume=True))) == outcome(whole)


def test_checkpoints_hold_the_adapter_and_not_the_model(settings):
    config = settings(save_steps=3)
    finetune(config)
    kept = sorted(p.name for p in Path(config.output).glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-9"]
    assert {p.name for p in Path(config.output, "checkpoint-12").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json",
    }  # fmt: skip
    saved = torch.load(Path(config.output, "checkpoint-12", "optimizer.pt"), weights_only=True)
    # Two moments and a step count of each parameter: 13 layers' A and B, the head's weight and bias.
    assert len(saved["state"]) == 28


# --- what must not change the result ---------------------------------------------------------------------------------


@pytest.fixture
def no_dropout(inputs, tmp_path):
    models, _ = inputs
    model = transformers.BertModel.from_pretrained(models["classification"])
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(tmp_path / "no_dropout")
    transformers.AutoTokenizer.from_pretrained(models["classification"]).save_pretrained(tmp_path / "no_dropout")
    return str(tmp_path / "no_dropout")


@pytest.mark.parametrize("task", TASKS)
def test_accumulating_gradients_equals_the_larger_batch(settings, no_dropout, tmp_path, task):
    config = settings(task, optimizer="sgd", learning_rate=0.1)
    config = replace(config, model=no_dropout) if task == "classification" else config
    one = finetune(replace(config, output=str(tmp_path / "one")))
    four = finetune(replace(config, batch_size=2, grad_accumulation=4, output=str(tmp_path / "four")))
    assert [loss for _, loss in four["loss_history"]] == pytest.approx(
        [loss for _, loss in one["loss_history"]], rel=1e-3
    )
    assert four["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_gradient_checkpointing_changes_nothing(settings, monkeypatch, tmp_path, task):
    calls = []
    down_project = reference.down_project
    monkeypatch.setattr(reference, "down_project", lambda *a: calls.append(1) or down_project(*a))
    config = settings(task, max_steps=2)
    plain = finetune(replace(config, output=str(tmp_path / "plain")))
    once = len(calls)
    again = finetune(replace(config, gradient_checkpointing=True, output=str(tmp_path / "checkpointed")))
    assert outcome(again) == outcome(plain)
    assert len(calls) - once > once, "nothing was computed a second time"


def test_bf16_trains_a_float32_adapter_and_head_on_a_bfloat16_base(settings):
    config = settings(bf16=True, max_steps=30)
    metrics = finetune(config)
    from safetensors.torch import load_file

    saved = load_file(Path(config.output, "adapter", "adapter_model.safetensors"))
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert metrics["device"]["dtype"] == "torch.bfloat16"
    assert metrics["after"]["loss"] < metrics["before"]["loss"]


def test_the_rule_and_the_layers_are_those_asked_for(settings, tmp_path):
    config = settings(norm=None, target_modules=["query", "value"], r=3)
    plain = finetune(config)
    adapter = json.loads(Path(config.output, "adapter", "adapter_config.json").read_text())
    assert adapter["r"] == 3 and adapter["allora_norm"] is None
    assert all(name.endswith(("query", "value")) for name in adapter["target_modules"])
    scaled = finetune(replace(config, norm="row", eta=4.0, optimizer="sgd", output=str(tmp_path / "scaled")))
    unscaled = finetune(replace(config, optimizer="sgd", output=str(tmp_path / "unscaled")))
    assert scaled["loss_history"] != unscaled["loss_history"] != plain["loss_history"]


def test_the_head_and_b_have_learning_rates_of_their_own(settings, monkeypatch):
    seen = []
    create = module.FinetuneTrainer.create_optimizer

    def spy(self, model=None):
        seen.append(create(self, model))
        return seen[-1]

    monkeypatch.setattr(module.FinetuneTrainer, "create_optimizer", spy)
    finetune(settings(head_learning_rate=0.5, loraplus_lr_ratio=4.0, max_steps=1, warmup_steps=1))
    a, b, head = seen[0].param_groups
    assert (a["initial_lr"], b["initial_lr"], head["initial_lr"]) == (0.02, 0.08, 0.5)
    assert {p.shape[0] for p in a["params"]} == {p.shape[1] for p in b["params"]} == {4}
    assert [tuple(p.shape) for p in head["params"]] == [(2, 16), (2,)]


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(settings):
    config = settings(optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0, save_steps=1)
    with pytest.raises(FloatingPointError, match=r"the loss became \w+ at step \d+: lower the learning rate"):
        finetune(config)
    last = module._last_checkpoint(Path(config.output))
    losses = [entry["loss"] for entry in module._state(last)["log_history"]]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_a_local_model_never_asks_the_network(settings, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    finetune(settings(max_steps=1))
