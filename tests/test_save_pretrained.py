"""`save_pretrained` of a model with adapters: loading back gives the same logits, or an error; never the base in silence."""

import copy
import os
import pickle
import warnings

import pytest
import torch
import transformers
from tiny_models import bert, gpt2, llama, logits, pretend_to_train
from torch import nn

from allora_kernels import apply_allora, load_adapter, merge_adapter, save_adapter, unmerge_adapter

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'")


def named_base(build, folder):
    """A model that came from a folder, as one of a user has."""
    build().save_pretrained(folder)
    return type(build()).from_pretrained(folder)


def adapted(build, folder, **arguments):
    model = named_base(build, folder)
    apply_allora(model, r=3, **arguments)
    return pretend_to_train(model)


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_it_loads_back_to_the_same_logits(build, tmp_path):
    heads = {"modules_to_save": ["classifier"]} if build is bert else {}
    model = adapted(build, tmp_path / "base", **heads)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert sorted(os.listdir(tmp_path / "saved")) == ADAPTER
    want = logits(model)
    assert not torch.allclose(logits(build()), want, atol=1e-3)

    again = type(model).from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), want)

    # With PEFT installed transformers puts the adapter on the base that it names.
    by_peft = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(by_peft), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="already has PEFT adapters"):
        load_adapter(by_peft, tmp_path / "saved")


def test_without_peft_loading_it_as_a_model_is_an_error(tmp_path, monkeypatch):
    adapted(llama, tmp_path / "base").save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(transformers.integrations.peft, "is_peft_available", lambda: False)
    with pytest.raises(OSError, match=r"config\.json|model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_base_that_could_not_be_found_again_is_refused(tmp_path):
    model = llama()
    apply_allora(model, r=2)
    with pytest.raises(ValueError, match=r"no name_or_path.*save_adapter\(model, folder\)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("argument", ["push_to_hub", "variant", "distributed_checkpoint"])
def test_what_cannot_be_honoured_is_refused(argument, tmp_path):
    model = adapted(llama, tmp_path / "base")
    with pytest.raises(ValueError, match=rf"{argument}='x'.*save_adapter"):
        model.save_pretrained(tmp_path / "saved", **{argument: "x"})
    assert not (tmp_path / "saved").exists()


def test_only_the_main_process_writes(tmp_path):
    model = adapted(llama, tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_values_gathered_by_an_engine_are_taken(tmp_path):
    """As Trainer hands them over where the model's own parameters are in pieces."""
    model = adapted(llama, tmp_path / "base", modules_to_save=["lm_head"])
    state = {f"_orig_mod.{key}": t.clone() for key, t in model.state_dict().items()}
    want = logits(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    again = type(model).from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), want)
    del state["_orig_mod.model.layers.0.self_attn.q_proj.lora_A"]
    with pytest.raises(ValueError, match=r"state_dict has no model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        save_adapter(model, tmp_path / "other", state_dict=state)
    assert not (tmp_path / "other").exists()


def test_a_part_of_a_model(tmp_path):
    """A transformers model inside another, or its own backbone, saves the adapters that it has."""
    model = adapted(bert, tmp_path / "base")
    model.bert.save_pretrained(tmp_path / "saved")
    again = transformers.BertModel.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "saved")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, model.bert(ids).last_hidden_state)

    whole = nn.ModuleDict({"encoder": named_base(bert, tmp_path / "base"), "plain": llama()})
    apply_allora(whole, r=2, target_modules=["query"])
    whole["encoder"].save_pretrained(tmp_path / "inner")
    whole["plain"].save_pretrained(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path / "inner")) == ADAPTER
    assert "model.safetensors" in os.listdir(tmp_path / "plain")


def test_copies_save_their_own_adapters(tmp_path):
    model = adapted(llama, tmp_path / "base")
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.lora_B.mul_(2)
        twin.save_pretrained(tmp_path / f"{i}")
        again = llama()
        load_adapter(again, tmp_path / f"{i}")
        assert torch.equal(logits(again), logits(twin))
        assert not torch.equal(logits(twin), logits(model))


def test_a_merged_model_is_saved_whole_again(tmp_path):
    model = adapted(llama, tmp_path / "base")
    want = logits(model)
    merge_adapter(model, keep=True)
    assert "save_pretrained" not in model.__dict__ and "save_pretrained" not in model.model.__dict__
    model.save_pretrained(tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), want, rtol=1e-5, atol=1e-5)
    unmerge_adapter(model)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ADAPTER


def test_someone_elses_override_comes_back(tmp_path):
    model = named_base(llama, tmp_path / "base")
    model.save_pretrained = theirs = lambda *_: "theirs"
    apply_allora(model, r=2)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ADAPTER
    merge_adapter(model)
    assert model.save_pretrained is theirs


def test_a_save_warns_of_what_it_loses(tmp_path):
    model = adapted(llama, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "saved")
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"trained but not saved.*model\.norm\.weight"):
        model.save_pretrained(tmp_path / "saved")
