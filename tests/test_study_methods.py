"""The study's methods: what is trained, that seeds pair them, and that the one-sided coefficient is what it says."""

import math

import pytest
import torch
from study_cells import tiny_task

from allora_kernels.reference import weight_coefficient
from bench.study import flaws, methods, tasks, training

TRAINED = [m for m in methods.METHODS.values() if m.kind != "frozen"]


@pytest.fixture
def task(tmp_path, monkeypatch):
    return tiny_task(tmp_path, monkeypatch)


def adapters(model):
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in methods.adapted_layers(model).items()
    }


def gradients(task, method, norm_of_b=0.3):
    """dA and dB of each layer, at the same adapters and on the same texts for every method."""
    model = methods.build(task, method, 0).eval()
    generator = torch.Generator().manual_seed(5)
    for a, b in adapters(model).values():
        a.data.copy_(torch.randn(a.shape, generator=generator))
        b.data.copy_(torch.randn(b.shape, generator=generator) * norm_of_b)
    rows, _ = tasks.training_parts(task)
    collate = training._collator(task, tasks.load_tokenizer(task.model))
    model(**collate([rows[i] for i in range(8)])).loss.backward()
    return {name: (a.grad, b.grad, a.detach(), b.detach()) for name, (a, b) in adapters(model).items()}


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_the_two_one_sided_coefficients_are_the_halves_of_the_rule(task, norm):
    both, a_only, b_only = (gradients(task, methods.allora(norm, 4, side)) for side in (None, "A", "B"))
    plain = gradients(task, methods.LORA)
    for name, (da, db, a, b) in both.items():
        torch.testing.assert_close(a_only[name][0], da)
        torch.testing.assert_close(b_only[name][1], db)
        torch.testing.assert_close(a_only[name][1], plain[name][1])
        torch.testing.assert_close(b_only[name][0], plain[name][0])
        c = weight_coefficient(a, b, 2.0, norm)[:, None]
        torch.testing.assert_close(db, c * plain[name][1])
    # And the coefficient is there to be seen on both sides.
    assert any(not torch.allclose(both[name][0], plain[name][0], rtol=0.05) for name in both)
    assert any(not torch.allclose(both[name][1], plain[name][1], rtol=0.05) for name in both)


def test_a_one_sided_rule_that_does_not_exist_is_refused(task):
    with pytest.raises(ValueError, match="is for the rules row and matrix, got 'token'"):
        methods.build(task, methods.allora("token", 4, "A"), 0)


@pytest.mark.parametrize("method", TRAINED, ids=lambda m: m.name)
def test_what_a_method_trains(task, method):
    model = methods.build(task, method, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    body = {name for name in trained if "classifier" not in name}
    expected = {"head": body == set(), "full": len(body) == len([n for n, _ in model.named_parameters()]) - 2}
    adapted = all("lora_" in name for name in body) and adapters(model)
    assert expected.get(method.kind, adapted)
    if method.kind == "dora":
        assert any("magnitude" in name for name in trained)


def test_layers_are_pefts_own_but_for_allora(task):
    from peft.tuners.lora.layer import Linear

    from allora_kernels.integrations.peft import ALLoRALinear

    for method, cls in ((methods.LORA, Linear), (methods.DORA, Linear), (methods.ALLORA, ALLoRALinear)):
        layers = methods.adapted_layers(methods.build(task, method, 0)).values()
        assert {type(layer) for layer in layers} == {cls}
    layer = next(iter(layers))
    assert layer.allora_eta["default"] == 2.0 and layer.allora_norm["default"] == "row"


def test_the_settings_of_lora_reach_its_layers(task):
    layers = methods.adapted_layers(methods.build(task, methods.LORA_2_DROPOUT, 0)).values()
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.1}


def test_a_seed_gives_every_method_the_same_head_and_the_same_a(task):
    models = [methods.build(task, m, 3) for m in (methods.LORA, methods.DORA, methods.LORA_PLUS, methods.ALLORA)]
    heads = [methods.heads(model)[0].weight for model in models]
    assert all(torch.equal(head, heads[0]) for head in heads)
    for a, *others in zip(*([a for a, _ in adapters(model).values()] for model in models)):
        assert all(torch.equal(a, other) for other in others)
    assert torch.equal(methods.heads(methods.build(task, methods.HEAD, 3))[0].weight, heads[0])
    assert not torch.equal(methods.heads(methods.build(task, methods.LORA, 4))[0].weight, heads[0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "method", [methods.LORA, methods.LORA_PLUS, methods.ALLORA_PLUS, methods.HEAD, methods.FULL], ids=lambda m: m.name
)
def test_each_parameter_has_the_rate_it_should(task, method, optimizer):
    model = methods.build(task, method, 0)
    made = methods.make_optimizer(model, method, optimizer, 1e-3)
    rates = {p: group["lr"] for group in made.param_groups for p in group["params"]}
    assert set(rates) == {p for p in model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in made.param_groups) == len(rates)
    head = {p for head in methods.heads(model) for p in head.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and p in head:
            assert rates[p] == (1e-3 if method == methods.HEAD else methods.OPTIMIZERS[optimizer]["head_learning_rate"])
        elif p.requires_grad:
            assert rates[p] == pytest.approx(16e-3 if method.kind.endswith("a+") and "lora_B" in name else 1e-3)
    assert type(made) is {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    assert optimizer != "sgd" or {group["momentum"] for group in made.param_groups} == {0.9}


def trained(task, method, rate=0.02, steps=40, samples=None, seed=0, callbacks=(), optimizer="adamw"):
    with training.scratch_folder() as folder:
        trainer = training.make_trainer(task, method, optimizer, steps, samples, rate, seed, folder, callbacks)
        return training.train(trainer), training.measure(trainer, tasks.training_parts(task)[1])


def test_training_learns(task):
    went, found = trained(task, methods.ALLORA, steps=120)
    assert went["loss"][1] < went["loss"][0] - 0.4 and not went["diverged"] and found["accuracy"] > 0.8


def test_training_repeats(task):
    (went, found), (again, found_again) = (trained(task, methods.LORA_DROPOUT, steps=12) for _ in range(2))
    assert again["loss"] == went["loss"] and found_again == found
    assert trained(task, methods.LORA_DROPOUT, steps=12, seed=1)[0]["loss"] != went["loss"]


def test_a_run_that_diverges_says_so(task):
    went, _ = trained(task, methods.FULL, rate=1e30, steps=5, optimizer="sgd")
    assert went["diverged"] and went["loss"] == []


def test_a_seed_trains_every_method_on_the_same_rows(task):
    rows = [training.training_rows(task, 8, seed)["input_ids"] for seed in (1, 1, 2)]
    assert list(rows[0]) == list(rows[1]) != list(rows[2]) and len(rows[0]) == 8
    with pytest.raises(ValueError, match="has 72 rows to train on, 1000 were asked for"):
        training.training_rows(task, 1000, 0)


def test_nothing_frozen_is_trained(tmp_path, monkeypatch):
    task = tiny_task(tmp_path, monkeypatch, "causal-lm")
    went, found = trained(task, methods.FROZEN, rate=0.0)
    assert went["loss"] == [] and not went["diverged"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss_mean"])) and "accuracy" not in found


def test_a_language_model_gets_better(tmp_path, monkeypatch):
    task = tiny_task(tmp_path, monkeypatch, "causal-lm")
    _, before = trained(task, methods.FROZEN)
    _, after = trained(task, methods.ALLORA)
    assert after["perplexity"] < before["perplexity"] - 1


def test_a_prompt_is_judged_by_its_next_word(tmp_path, monkeypatch):
    task = tiny_task(tmp_path, monkeypatch, "prompt")
    row = tasks.training_parts(task)[0][0]
    assert row["labels"][-1] == row["input_ids"][-1] and set(row["labels"][:-1]) == {-100}
    went, found = trained(task, methods.ALLORA)
    assert found["accuracy"] > 0.8 and went["loss"][1] < went["loss"][0]
    # Against counting by hand on logits of which the right word is known.
    words = [tasks.word_id(task, label) for label in tasks.label_names(task)]
    labels = torch.tensor([[-100, -100, words[0]], [-100, words[1], -100]])
    logits = torch.zeros(2, 3, 40)
    logits[0, 1, words[0]] = logits[1, 0, words[0]] = 1.0
    losses, chosen = training._next_words(task)(logits, labels)
    assert chosen.tolist() == [words[0], words[0]]
    right, wrong = (math.log(math.e + 39) - x for x in (1.0, 0.0))
    torch.testing.assert_close(losses, torch.tensor([right, wrong]))


# --- the runs of the three flaws ------------------------------------------------------------------------------------


@pytest.fixture
def flaw_task(task, monkeypatch):
    monkeypatch.setattr(flaws, "TASK", task.name)
    return task


def test_norms_start_at_zero_and_are_pefts_delta(flaw_task):
    record = flaws.run_cell(flaws.norms_cell(methods.LORA_2, "adamw", 4, 0))
    assert len(record["B"]) == len(record["BA"]) == 4 and 0 < record["B"][1] < record["B"][3]
    model = methods.build(flaw_task, methods.LORA_2, 0)
    for _, b in adapters(model).values():
        b.data.normal_()
    norms = flaws.NormsByStep(model)
    norms.note()
    deltas = [layer.get_delta_weight("default").norm().item() for layer in methods.adapted_layers(model).values()]
    assert norms.ba == pytest.approx([sum(deltas) / len(deltas)], rel=1e-4)


def test_masks_change_the_loss_only_where_there_is_dropout(flaw_task):
    record = flaws.run_cell(flaws.dropout_cell(methods.LORA_DROPOUT, 20, 8, 0))
    assert len(set(record["differences"])) > 4
    record = flaws.run_cell(flaws.dropout_cell(methods.LORA, 3, 4, 0))
    assert record["differences"] == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("method", [methods.LORA, methods.ALLORA], ids=lambda m: m.name)
def test_a_multiplier_reaches_the_layers_of_its_place(flaw_task, method):
    def scales(place):
        model = methods.build(flaw_task, method, 0)
        flaws.multiply(model, method, 4.0, place)
        layers = methods.adapted_layers(model).values()
        return [x.allora_eta["default"] if method.kind == "allora" else x.scaling["default"] for x in layers]

    one = 2.0 if method.kind == "allora" else 1.0
    count = len(scales("all"))
    assert scales("all") == [4 * one] * count
    assert scales("lower") == [4 * one] * (count // 2) + [one] * (count - count // 2)
    assert scales("upper") == [one] * (count // 2) + [4 * one] * (count - count // 2)
    with pytest.raises(ValueError, match="place must be one of all, lower, upper, got 'middle'"):
        scales("middle")


def test_a_multiplier_of_one_is_the_run_itself(flaw_task):
    runs = [flaws.run_cell(flaws.scaling_cell(methods.LORA, "sgd", 3, m, "all", 0)) for m in (1.0, 1.0, 4.0)]
    assert runs[0]["logits"] == runs[1]["logits"] != runs[2]["logits"]
    with pytest.raises(ValueError, match="other settings"):
        flaws.run_cell(runs[0]["settings"] | {"learning_rate": 5.0})
