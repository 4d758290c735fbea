"""A forward pass that takes the output head's weight past its adapter is an error; one that calls the head is not touched."""

import copy
import pickle
import types

import pytest
import torch
from tiny_models import llama
from torch.utils.checkpoint import checkpoint

from allora_kernels import apply_allora, disable_adapters, merge_adapter, unmerge_adapter

IDS = torch.arange(14).reshape(2, 7)


def adapted(targets=("q_proj", "lm_head")):
    torch.manual_seed(0)
    model = llama()
    apply_allora(model, r=4, target_modules=list(targets))
    return model


def fused(model):
    """`model` with a forward pass as of a fused loss."""

    def forward(self, input_ids):
        return self.model(input_ids).last_hidden_state @ self.lm_head.weight.mT

    model.forward = types.MethodType(forward, model)
    return model


def test_a_result_past_the_adapter_is_an_error():
    model = fused(adapted())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"lm_head has an adapter, but LlamaForCausalLM's .* did not call it"):
            model(input_ids=IDS)
    with torch.no_grad(), pytest.raises(RuntimeError, match="past the adapter"):
        model.eval()(input_ids=IDS)


def test_what_is_right_is_left_alone():
    model = adapted()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.lm_head.lora_B.grad.abs().sum() > 0
    fused(adapted(["q_proj"]))(input_ids=IDS)
    other = fused(adapted())
    with disable_adapters(other):
        other(input_ids=IDS)
    merge_adapter(other, keep=True)
    other(input_ids=IDS)
    unmerge_adapter(other)
    with pytest.raises(RuntimeError, match="past the adapter"):
        other(input_ids=IDS)


def test_a_merged_model_that_is_adapted_again_is_watched_once():
    model = adapted()
    merge_adapter(model)
    apply_allora(model, r=4, target_modules=["lm_head"])
    model(input_ids=IDS)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    with pytest.raises(RuntimeError, match="past the adapter"):
        fused(model)(input_ids=IDS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_watched_apart(duplicate):
    model = adapted()
    twin = fused(duplicate(model))
    model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="past the adapter"):
        twin(input_ids=IDS)
    model(input_ids=IDS)


def test_compiled_and_checkpointed():
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)
    for reentrant in (True, False):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        checkpoint(lambda x: model(inputs_embeds=x).logits, embedded, use_reentrant=reentrant).sum().backward()
