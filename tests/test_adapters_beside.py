"""Several adapters on one model and what else a model has: modules trained whole, files, merging, the rest of the library."""

import copy
import pickle

import pytest
import torch
from several_adapters import IDS, NAMES, RULES, Net, alone, gradients, plainly, several
from tiny_models import llama, photograph, transformer
from torch import nn

from allora_kernels import (
    active_adapter,
    adapter_layers,
    adapter_names,
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    explain,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from allora_kernels.models.saved_whole import ModuleOfEachAdapter

# --- modules trained whole ------------------------------------------------------------------------------------------


def classifiers(**arguments):
    return several(
        lambda: transformer("Bert", "ForSequenceClassification", num_labels=3),
        modules_to_save=["classifier"],
        **arguments,
    )


def test_each_adapter_has_its_own_head():
    model = classifiers()
    assert isinstance(model.classifier, ModuleOfEachAdapter) and model.classifier.out_features == 3
    names = ["wide", "default", "wide", "plain", "default", "wide"]
    with adapter_rows(model, names):
        y = model(input_ids=IDS).logits
    heads = {name: model.classifier.copies[name].weight for name in RULES}
    assert len({id(w) for w in heads.values()}) == 3
    y.square().sum().backward()
    mixed = {name: (heads[name].grad.clone(), gradients(model, name)) for name in RULES}
    model.zero_grad()
    for i, name in enumerate(names):
        want = alone(model, name, IDS[i : i + 1])
        torch.testing.assert_close(y[i], want[0], rtol=1e-4, atol=1e-5)
        want.square().sum().backward()
    for name, (head, grads) in mixed.items():
        torch.testing.assert_close(head, heads[name].grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(grads, gradients(model, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_heads_that_see_all_tokens_and_dropout_of_their_own():
    model = several(
        lambda: transformer("Roberta", "ForSequenceClassification"),
        modules_to_save=["classifier"],
        rules={"a": {}, "b": {}},
    )
    names = ["b", "a", "b", "a", "a", "b"]
    with torch.no_grad(), adapter_rows(model, names):
        y = model(input_ids=IDS).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], alone(model, name)[i], rtol=1e-4, atol=1e-5)


def test_there_is_no_frozen_head_for_samples_without_an_adapter():
    with pytest.raises(ValueError, match="classifier is trained whole"), adapter_rows(classifiers(), NAMES):
        pass


def test_a_head_goes_with_its_adapter():
    model = classifiers()
    kept = model.classifier.copies["wide"]
    set_adapter(model, "wide")
    remove_adapter(model, "default")
    remove_adapter(model, "plain")
    assert model.classifier is kept
    assert [n for n, _ in model.named_parameters() if "classifier" in n] == ["classifier.weight", "classifier.bias"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_each_adapter_is_saved_and_peft_loads_it(tmp_path):
    from test_checkpoint import load_with_peft

    for build, arguments in (
        (llama, {}),
        (lambda: transformer("Bert", "ForSequenceClassification"), {"modules_to_save": ["classifier"]}),
    ):
        model = several(build, **arguments)
        for name in RULES:
            folder = tmp_path / build.__name__ / name
            save_adapter(model, folder, adapter=name)
            with torch.no_grad():
                want = alone(model, name)
                torch.testing.assert_close(
                    load_with_peft(build(), folder)(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5
                )
                fresh = build()
                report = load_adapter(fresh, folder)
                assert report.adapters == ("default",)
                torch.testing.assert_close(fresh(input_ids=IDS).logits, want)


def test_adapters_are_loaded_beside_and_into_each_other(tmp_path):
    model = classifiers()
    for name in RULES:
        save_adapter(model, tmp_path / name, adapter=name)
    other = transformer("Bert", "ForSequenceClassification", num_labels=3)
    load_adapter(other, tmp_path / "wide", adapter="wide")
    report = load_adapter(other, tmp_path / "default", adapter="default")
    assert report.adapters == ("wide", "default") and report.active == "wide"
    with torch.no_grad():
        for name in ("wide", "default"):
            assert torch.equal(alone(other, name), alone(model, name))
    with pytest.raises(ValueError, match="say which one, load_adapter"):
        load_adapter(other, tmp_path / "wide")
    before = photograph(other)
    with pytest.raises(ValueError, match="r=3 in the model and r=5 in the file"):
        load_adapter(other, tmp_path / "wide", adapter="default")
    assert photograph(other) == before
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1 if p.requires_grad else 0)
    load_adapter(other, tmp_path / "default", adapter="default")
    with torch.no_grad():
        assert torch.equal(alone(other, "default"), alone(model, "default"))
        assert not torch.allclose(alone(other, "wide"), alone(model, "wide"))


def test_a_state_dict_is_loaded_right_whichever_adapter_was_active():
    model, other = classifiers(), classifiers()
    want = {name: alone(model, name).detach() for name in RULES}
    set_adapter(model, "wide")
    state = {key: t.clone() for key, t in model.state_dict().items()}
    for assign in (False, True):
        with torch.no_grad():
            for p in adapter_parameters(other):
                p.zero_()
        set_adapter(other, "plain")
        other.load_state_dict(state, assign=assign)
        assert active_adapter(other) == "plain"
        layer = next(iter(adapter_layers(other).values()))
        assert layer.lora_A is layer.adapters["plain"].lora_A
        for name in RULES:
            assert torch.equal(alone(other, name), want[name])
    single = several(llama, {"default": {"r": 3}})
    with pytest.raises(RuntimeError, match=r"Missing key.*adapters\.wide\.lora_A"):
        several().load_state_dict(single.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*adapters\.wide\.lora_A"):
        single.load_state_dict(several().state_dict())


def test_copies_are_apart_and_outside_of_any_block():
    model = several()
    with adapter_rows(model, NAMES):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert adapter_names(twin) == tuple(RULES)
        with torch.no_grad():
            for name in RULES:
                assert torch.equal(alone(twin, name), alone(model, name))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        layer = next(iter(adapter_layers(twin).values()))
        assert layer.lora_A is layer.adapters["default"].lora_A


def test_a_model_made_on_meta_keeps_its_two_names_of_one_parameter():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    apply_allora(nn.Sequential(model), r=2)
    add_adapter(model, "b", r=3)
    model.to_empty(device="cpu")
    assert model[0].lora_A is model[0].adapters["default"].lora_A and not model[0].lora_A.is_meta


# --- the rest of the library ----------------------------------------------------------------------------------------


def test_merging_keeps_the_others():
    model = several()
    set_adapter(model, "wide")
    with torch.no_grad():
        want = {name: alone(model, name) for name in RULES}
        merge_adapter(model, keep=True)
        assert adapter_names(model) == ()
        torch.testing.assert_close(model(input_ids=IDS).logits, want["wide"])
        unmerge_adapter(model)
        for name in RULES:
            assert torch.equal(alone(model, name), want[name])
        with adapter_rows(model, NAMES), pytest.raises(ValueError, match="inside adapter_rows"):
            merge_adapter(model, keep=True)
        for name in ("default", "plain"):
            remove_adapter(model, name)
        torch.testing.assert_close(merge_adapter(model)(input_ids=IDS).logits, want["wide"])


def test_explain_says_which_adapter():
    model = several()
    assert "adapter 'default' of 3" in str(explain(model))
    set_adapter(model, "wide")
    assert "r=5" in str(explain(model)) and "adapter 'wide' of 3" in str(explain(model))
    heads = {name: layer for name, layer in explain(classifiers()).layers.items() if "classifier" in name}
    assert len(heads) == 3 and all("trained whole" in layer.reason for layer in heads.values())
    with adapter_rows(model, NAMES), pytest.raises(ValueError, match="explain outside"):
        explain(model)


def test_a_compiled_model_takes_mixed_batches():
    model = several(lambda: Net(plainly), {"a": {"r": 2}, "b": {"r": 3}})
    compiled = torch.compile(model, backend="eager")
    for names, tokens in (
        (["a", "b", None], 4),
        (["b", None, "a"], 4),
        (["a", "b", None], 6),
        (["b", "a", "a", "b"], 7),
    ):
        x = torch.randn(len(names), tokens, 5)
        with adapter_rows(compiled, names):
            y = compiled(x)
        with adapter_rows(model, names):
            torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_opacus_refuses_several():
    pytest.importorskip("opacus")
    from allora_kernels.integrations.opacus import reasons_against

    model = several().train()
    assert "has several adapters" in reasons_against(model)[0]
    for name in ("wide", "plain"):
        remove_adapter(model, name)
    assert reasons_against(model) == []
