"""`merge_adapter(model, keep=True)` and `unmerge_adapter`: everything as it was, bit for bit."""

import copy
import pickle

import pytest
import torch
from test_adapt import IDS, Net, SharedParts
from tiny_models import bert, gpt2, llama, logits, photograph, pretend_to_train
from torch import nn

from allora_kernels import adapter_layers, apply_allora, load_adapter, merge_adapter, save_adapter, unmerge_adapter


def adapted(build, **arguments):
    model = build()
    apply_allora(model, r=3, **arguments)
    return pretend_to_train(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_it_puts_back_every_bit(build, dtype):
    heads = {"modules_to_save": ["classifier"]} if build is bert else {}
    model = adapted(lambda: build().to(dtype), **heads)
    before, want, layers = photograph(model), logits(model), adapter_layers(model)
    assert merge_adapter(model, keep=True) is model
    assert not adapter_layers(model) and "lora" not in " ".join(model.state_dict())
    torch.testing.assert_close(logits(model), want, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    merged = logits(model)
    assert unmerge_adapter(model) is model
    assert photograph(model) == before
    assert adapter_layers(model) == layers
    assert torch.equal(logits(model), want)
    merge_adapter(model, keep=True)
    assert torch.equal(logits(model), merged)


def test_a_layer_that_was_compiled_by_itself_calls_what_takes_its_place():
    """torch.compile(layer) holds on to the layer that it was given."""
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    base = nn.Linear(4, 5)
    plain, model = nn.Sequential(base), nn.Sequential(torch.compile(copy.deepcopy(base), backend="aot_eager"))
    torch.testing.assert_close(model(x), plain(x))
    results = []
    for net in (plain, model):
        apply_allora(net, r=2)
        (layer,) = adapter_layers(net).values()
        with torch.no_grad():
            layer.lora_A.fill_(0.5), layer.lora_B.fill_(0.3)
        y = net(x)
        y.square().sum().backward()
        results.append([y, layer.lora_A.grad, layer.lora_B.grad])
        merge_adapter(net, keep=True)
        torch.testing.assert_close(net(x), y)
        merged = getattr(net[0], "_orig_mod", net[0])
        nn.init.zeros_(merged.weight)
        torch.testing.assert_close(net(x), merged.bias.expand(3, 5))
        unmerge_adapter(net)
        torch.testing.assert_close(net(x), y)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_training_goes_on():
    model = adapted(Net, modules_to_save=["head"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    merge_adapter(model, keep=True)
    model.eval()
    unmerge_adapter(model)
    assert not any(layer.training for layer in adapter_layers(model).values())
    model(IDS).square().sum().backward()
    before = model.blocks[0].q.lora_B.clone()
    optimizer.step()
    assert not torch.equal(model.blocks[0].q.lora_B, before)


def test_what_was_done_to_the_merged_weights_is_dropped():
    model = adapted(Net)
    want = model(IDS)
    merge_adapter(model, keep=True)
    with torch.no_grad():
        model.blocks[0].q.weight.zero_()
    assert not torch.equal(model(IDS), want)
    assert torch.equal(unmerge_adapter(model)(IDS), want)


def test_shared_layers_and_fast_paths_come_back():
    model = adapted(SharedParts)
    merge_adapter(model, keep=True)
    unmerge_adapter(model)
    assert model.again is model.first and model.mirror.q is model.blocks[0].q and len(adapter_layers(model)) == 4

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    apply_allora(encoder, r=2)
    pretend_to_train(encoder)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        want = encoder(x)
        merge_adapter(encoder, keep=True)
        assert encoder.layers[0].activation_relu_or_gelu
        unmerge_adapter(encoder)
        assert not encoder.layers[0].activation_relu_or_gelu
        assert torch.equal(encoder(x), want)


def test_copies_of_a_merged_model_are_independent():
    model = adapted(Net, modules_to_save=["head"])
    want = model(IDS)
    merge_adapter(model, keep=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unmerge_adapter(twin)
        assert torch.equal(twin(IDS), want)
        with torch.no_grad():
            twin.blocks[0].q.lora_B.zero_()
    assert torch.equal(unmerge_adapter(model)(IDS), want)


def test_the_kept_layers_follow_the_model():
    model = adapted(Net)
    merge_adapter(model, keep=True).to("meta")
    unmerge_adapter(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_what_cannot_be_unmerged_leaves_the_model_untouched(tmp_path):
    model = adapted(Net)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the model has adapters"):
        unmerge_adapter(model)
    merge_adapter(model)
    with pytest.raises(ValueError, match="keep=True"):
        unmerge_adapter(model)
    load_adapter(model, tmp_path)
    merge_adapter(model, keep=True).to(torch.bfloat16)
    before = photograph(model)
    with pytest.raises(ValueError, match=r"was torch\.float32 when it was merged and is torch\.bfloat16"):
        unmerge_adapter(model)
    assert photograph(model) == before
    unmerge_adapter(model.float())
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        unmerge_adapter("model")
