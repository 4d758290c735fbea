"""One call after another on the same model: what each leaves behind is right for the next."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    adapter_layers,
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    load_adapter,
    merge_adapter,
    per_sample,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)


def two_adapters(model=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)) if model is None else model
    apply_allora(model, r=2)
    add_adapter(model, "b", r=2)
    for name in ("default", "b"):
        for p in adapter_parameters(model, name):
            nn.init.normal_(p)
    return model


def test_a_mixed_batch_in_inference_mode_and_then_in_training():
    model, x = two_adapters(), torch.randn(2, 4)
    with adapter_rows(model, ["default", "b"]):
        with torch.inference_mode():
            before = model(x)
        after = model(x)
    after.sum().backward()
    assert torch.equal(before, after)


def test_the_innermost_of_two_mixed_batches_counts():
    model, x = two_adapters(), torch.randn(2, 4)
    with adapter_rows(model, ["b", "default"]):
        expected = model(x)
    with adapter_rows(model, ["default", "b", "b"]):
        with adapter_rows(model, ["b", "default"]):
            assert torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="names the adapters of 3 samples"):
            model(x)


def test_a_mixed_batch_is_run_again_in_another_one():
    model, x = two_adapters(), torch.randn(3, 4)
    names = ["default", "b", "b"]
    with adapter_rows(model, names):
        expected = torch.autograd.grad(model(x).sum(), adapter_parameters(model, "b"))
        y = checkpoint(model, x, use_reentrant=False)
    with adapter_rows(model, ["b", "default"]):
        found = torch.autograd.grad(y.sum(), adapter_parameters(model, "b"))
    for gradient, wanted in zip(found, expected):
        assert torch.equal(gradient, wanted)


def rows_of_b(model, x):
    with adapter_rows(model, ["b", "b", "default"]):
        return checkpoint(model, x, use_reentrant=False)


def alone_in_b(model, x):
    set_adapter(model, "b")
    y = checkpoint(model, x, use_reentrant=False)
    set_adapter(model, "default")
    return y


@pytest.mark.parametrize("forward", [alone_in_b, rows_of_b])
@pytest.mark.parametrize("whole", [False, True])
def test_no_adapter_takes_the_place_of_one_that_was_removed(forward, whole):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    apply_allora(model, r=2, target_modules=["0"], modules_to_save=["2"] if whole else None)
    add_adapter(model, "b", r=2)
    y = forward(model, torch.randn(3, 4, requires_grad=True))
    remove_adapter(model, "b")
    add_adapter(model, "b", r=2)
    with pytest.raises(RuntimeError, match="with adapter 'b' is run again, but that adapter was removed since"):
        y.sum().backward()
    # The new one is an adapter like any other.
    forward(model, torch.randn(3, 4)).sum().backward()


def test_micro_batches_with_and_without_names_in_one_record():
    model, x = two_adapters(), torch.randn(4, 4)
    with per_sample.record(model):
        with adapter_rows(model, ["b", "b"]):
            model(x[:2]).sum().backward()
        model(x[2:]).sum().backward()
    found = per_sample.norms(model)
    with per_sample.record(model), adapter_rows(model, ["b", "b", "default", "default"]):
        model(x).sum().backward()
    torch.testing.assert_close(found, per_sample.norms(model))


def test_a_record_of_a_mixed_batch_in_a_file():
    model = two_adapters()
    with per_sample.record(model), adapter_rows(model, ["default", "b", None, "b"]):
        model(torch.randn(4, 4)).sum().backward()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(per_sample.norms(again), per_sample.norms(model))
    for one in (model, again):
        per_sample.clip_(one, 0.1)
    for name in ("default", "b"):
        for p, q in zip(adapter_parameters(again, name), adapter_parameters(model, name)):
            assert torch.equal(p.grad, q.grad)
    per_sample.clear(again)
    assert not any(hasattr(p, "grad_sample_of") for p in adapter_parameters(again, "b"))


def test_a_part_of_a_saved_module_keeps_its_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    model[1][0].eval()
    apply_allora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    add_adapter(model, "b", r=2)
    for head in model[1].copies.values():
        assert not head[0].training and head[1].training
    assert model[1].training


def test_an_adapter_is_called_like_a_saved_module(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 3)})
    apply_allora(model, r=2, target_modules=["body"], modules_to_save=["classifier"])
    add_adapter(model, "film_classifier", r=2)
    save_adapter(model, tmp_path, adapter="film_classifier")
    report = load_adapter(model, tmp_path, adapter="film_classifier")
    assert report.modules_to_save == ("classifier",) and report.adapters == ("default", "film_classifier")
    load_adapter(model, tmp_path, adapter="other_classifier")


# --- merging and back ---


def test_a_merge_that_keeps_nothing_is_not_undone_to_the_one_before():
    from tiny_models import mixture

    model = mixture("Olmoe", num_hidden_layers=1)
    for keep in (True, False):
        apply_allora(model, r=2, experts=True)
        merge_adapter(model, keep=keep)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_adapter(model)
    assert not adapter_layers(model)


def test_a_second_merge_of_fewer_layers_is_undone_alone():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    for names in (["0", "1"], ["0"]):
        apply_allora(model, r=2, target_modules=names)
        for p in adapter_parameters(model):
            nn.init.normal_(p)
        y = model(x)
        merge_adapter(model, keep=True)
    unmerge_adapter(model)
    assert list(adapter_layers(model)) == ["0"]
    torch.testing.assert_close(model(x), y)


def test_a_merged_model_has_one_head_and_gets_all_of_them_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    names = list(model.state_dict())
    apply_allora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    add_adapter(model, "b", r=2)
    set_adapter(model, "b")
    nn.init.normal_(model[1].active.weight)
    x, before = torch.randn(2, 4), model.state_dict()
    y = model(x)
    merge_adapter(model, keep=True)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), y)
    unmerge_adapter(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], t) for key, t in before.items())
    assert torch.equal(model(x), y)
    set_adapter(model, "default")
    merge_adapter(model, keep=True).double()
    with pytest.raises(ValueError, match=r"was torch\.float32 when it was merged"):
        unmerge_adapter(model)
    unmerge_adapter(model.float())
    set_adapter(model, "b")
    torch.testing.assert_close(model(x), y)


def test_a_second_merge_has_the_head_that_is_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    apply_allora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    add_adapter(model, "b", r=2)
    merge_adapter(model, keep=True)
    apply_allora(model, r=2, target_modules=["0"])
    head = model[1]
    merge_adapter(model, keep=True)
    unmerge_adapter(model)
    assert model[1] is head and type(head) is nn.Linear


def test_a_merged_layer_whose_weight_is_anothers_too_was_cast():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    apply_allora(model, r=2, target_modules=["0"])
    merge_adapter(model, keep=True)
    model.half()
    with pytest.raises(ValueError, match=r"0 was torch\.float32 when it was merged and is torch\.float16 now"):
        unmerge_adapter(model)
