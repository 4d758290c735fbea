"""Several adapters on one model: added, switched and removed."""

import itertools

import pytest
import safetensors.torch
import torch
from several_adapters import IDS, RULES, several
from tiny_models import bert, llama, logits, photograph, pretend_to_train
from torch import nn
from torch.nn.utils import parametrizations, prune

from allora_kernels import (
    FusedALLoRALinear,
    active_adapter,
    adapter_layers,
    adapter_names,
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
)

# --- adding, switching, removing ------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_until_it_is_trained():
    model = llama()
    base = logits(model)
    apply_allora(model, r=3)
    pretend_to_train(model)
    want = logits(model)
    report = add_adapter(model, "other", r=5, norm="token", rank_pattern={"q_proj": 2})
    assert adapter_names(model) == ("default", "other") == report.adapters
    assert active_adapter(model) == "default" == report.active
    assert "adapter default is active, beside other" in str(report)
    assert torch.equal(logits(model), want)
    set_adapter(model, "other")
    assert torch.equal(logits(model), base)
    layers = adapter_layers(model)
    assert {layer.r for name, layer in layers.items() if "q_proj" in name} == {2}
    assert {layer.r for name, layer in layers.items() if "q_proj" not in name} == {5}
    assert {(layer.eta, layer.norm) for layer in layers.values()} == {(2.0, "token")}
    set_adapter(model, "default")
    assert torch.equal(logits(model), want)
    assert {layer.r for layer in layers.values()} == {3}


def test_a_model_with_one_adapter_is_as_it_was_before_there_were_others():
    model = pretend_to_train((lambda m: (apply_allora(m, r=3), m)[1])(bert()))
    keys, tree = list(model.state_dict()), [name for name, _ in model.named_modules()]
    add_adapter(model, "other")
    assert list(model.state_dict()) != keys
    remove_adapter(model, "other")
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == tree
    add_adapter(model, "other")
    set_adapter(model, "other")
    remove_adapter(model, "default")
    assert list(model.state_dict()) == keys and adapter_names(model) == ("other",)
    add_adapter(model, "default")
    assert adapter_names(model) == ("other", "default")


def test_parameters_stay_the_same_objects_and_each_adapter_is_a_group():
    model = several()
    groups = {name: adapter_parameters(model, name) for name in RULES}
    everything = [p for group in groups.values() for p in group]
    assert len(everything) == len({id(p) for p in everything}) == len(adapter_parameters(model)) == 3 * 2 * 14
    set_adapter(model, "wide")
    for name, group in groups.items():
        assert all(a is b for a, b in zip(group, adapter_parameters(model, name), strict=True))
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.lora_A is groups["wide"][0] and layer.adapters["wide"].lora_A is groups["wide"][0]
    before = [p.detach().clone() for p in everything]
    optimizer = torch.optim.SGD([{"params": group} for group in groups.values()], lr=0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    changed = {id(p) for p, was in zip(everything, before) if not torch.equal(p, was)}
    assert changed == {id(p) for p in groups["wide"]}


def test_a_rule_that_was_set_anew_is_kept():
    model = several()
    for layer in adapter_layers(model).values():
        layer.eta = 0.5
    set_adapter(model, "wide")
    set_adapter(model, "default")
    assert {layer.eta for layer in adapter_layers(model).values()} == {0.5}


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m: set_adapter(m, "wde"), ValueError, "no adapter 'wde'.*did you mean 'wide'"),
        (lambda m: remove_adapter(m, "defalt"), ValueError, "did you mean 'default'"),
        (lambda m: adapter_parameters(m, "plan"), ValueError, "did you mean 'plain'"),
        (lambda m: save_adapter(m, "nowhere", adapter="wild"), ValueError, "did you mean 'wide'"),
        (lambda m: set_adapter(m, 3), TypeError, "name must be a str, got int"),
        (lambda m: remove_adapter(m, "default"), ValueError, "'default' is active.*set_adapter"),
        (lambda m: add_adapter(m, "wide"), ValueError, "has an adapter 'wide' already"),
        (lambda m: add_adapter(m, ""), ValueError, "must not be empty"),
        (lambda m: add_adapter(m, "a.b"), ValueError, "contain a dot"),
        (lambda m: add_adapter(m, "keys"), ValueError, "attribute of torch.nn.ModuleDict"),
        (lambda m: add_adapter(m, None), TypeError, "must be a str"),
        (lambda m: add_adapter(m, "new", r=0), ValueError, "r must be between"),
        (lambda m: add_adapter(m, "new", norm="rows"), ValueError, "norm must be one of"),
        (lambda m: add_adapter(m, "new", rank_pattern={"nothing": 2}), ValueError, "matches none of the layers"),
        (lambda m: apply_allora(m), ValueError, r"add_adapter\(model, name\)"),
        (lambda m: save_adapter(m, "nowhere"), ValueError, "say which one, save_adapter.*adapter=name"),
        (lambda m: m.save_pretrained("nowhere"), ValueError, "name_or_path"),
        (lambda m: merge_adapter(m), ValueError, "would lose the others"),
        (lambda m: add_adapter(nn.DataParallel(m), "new"), ValueError, "DistributedDataParallel"),
    ],
)  # fmt: skip
def test_wrong_calls_are_named_and_change_nothing(call, error, match):
    model = several()
    before = photograph(model)
    with pytest.raises(error, match=match):
        call(model)
    assert photograph(model) == before


@pytest.mark.parametrize(
    "call", [add_adapter, set_adapter, remove_adapter, lambda m, name: adapter_rows(m, [name]).__enter__()]
)
def test_a_model_without_adapters(call):
    with pytest.raises(ValueError, match=r"no adapters: apply_allora\(model\) first"):
        call(llama(), "default")


def test_the_only_adapter_is_not_removed():
    model = several(rules={"one": {}})
    with pytest.raises(ValueError, match="only adapter"):
        remove_adapter(model, "one")


def test_a_failure_in_the_middle_takes_the_adapter_away_again(monkeypatch):
    model = several()
    before = photograph(model)
    add, calls = FusedALLoRALinear.add_named_adapter, itertools.count()

    def failing(*args):
        if next(calls) == 5:
            raise MemoryError
        add(*args)

    monkeypatch.setattr(FusedALLoRALinear, "add_named_adapter", failing)
    with pytest.raises(MemoryError):
        add_adapter(model, "new")
    assert photograph(model) == before


# --- names and order do not follow the active one ---


def two():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    apply_allora(model, r=2, adapter_name="a")
    add_adapter(model, "b", r=2)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def test_parameters_lie_in_the_same_order_whichever_is_active():
    model = two()
    names, parameters = zip(*model.named_parameters())
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda average, new, _: (average + new) / 2)
    average.update_parameters(model)
    set_adapter(model, "b")
    assert tuple(zip(*model.named_parameters())) == (names, parameters)
    average.update_parameters(model)
    for own, averaged in zip(adapter_parameters(model, "a"), adapter_parameters(average.module, "a")):
        torch.testing.assert_close(averaged, own)
    assert all(isinstance(p, nn.Parameter) for p in (model[0].lora_A, model[0].lora_B))
    model[0].lora_A = nn.Parameter(torch.ones(2, 6))
    assert model[0].adapters["b"].lora_A is model[0].lora_A and "lora_A" not in model[0]._parameters


def test_files_of_whole_models_fit_whichever_is_active(tmp_path):
    model = two()
    want = {name: t.clone() for name, t in model.state_dict().items()}
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    set_adapter(model, "b")
    for p in model.parameters():
        nn.init.zeros_(p)
    safetensors.torch.load_model(model, tmp_path / "model.safetensors")
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())


def test_a_moving_average_of_a_model_is_saved_as_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    apply_allora(model, r=2)
    nn.init.normal_(model[0].lora_B)
    save_adapter(torch.optim.swa_utils.AveragedModel(model), tmp_path)
    other = nn.Sequential(nn.Linear(6, 5))
    load_adapter(other, tmp_path)
    assert torch.equal(other[0].lora_B, model[0].lora_B)


# --- factors that are computed from other parameters ---


@pytest.mark.parametrize("how", [prune.identity, parametrizations.weight_norm])
def test_a_computed_factor_is_not_written_to(how, tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    apply_allora(model, r=2)
    save_adapter(model, tmp_path)
    how(model[1], "lora_A")
    want = model[1].lora_A.clone()
    for call in (lambda: load_adapter(model, tmp_path), lambda: add_adapter(model, "b")):
        with pytest.raises(ValueError, match=r"of 1 lora_A is computed from other parameters .*prune.remove"):
            call()
    assert torch.equal(model[1].lora_A, want) and adapter_names(model) == ("default",)
    linear = nn.Linear(6, 5)
    how(linear, "weight")
    with pytest.raises(TypeError, match="a weight that is a parameter, not one computed from others"):
        FusedALLoRALinear.from_linear(linear)
