"""One call after another on a PeftModel that trains by ALLoRA's rule: adapters beside adapters, and what is refused."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import llama  # noqa: E402

from allora_kernels import apply_allora  # noqa: E402
from allora_kernels.integrations.peft import ALLoRAConfig, get_allora_model, load_allora_model  # noqa: E402

SMALL = {"r": 2, "lora_alpha": 2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))


def config(*targets, **settings):
    return LoraConfig(**SMALL, target_modules=list(targets), **settings)


def ruled(*targets, **settings):
    return ALLoRAConfig(**SMALL, target_modules=list(targets), **settings)


def plain_folder(folder, *targets):
    get_peft_model(net(), config(*targets, init_lora_weights=False)).save_pretrained(folder)
    return folder


def test_no_adapter_trains_without_a_rule_on_a_layer_of_its_own(tmp_path):
    model = get_allora_model(net(), config("0"))
    model.load_adapter(plain_folder(tmp_path, "2"), "third")
    model.set_adapter("third")
    x = torch.randn(3, 4)
    expected = get_peft_model(net(), config("0"))
    expected.load_adapter(tmp_path, "third")
    expected.set_adapter("third")
    y = model.eval()(x)
    torch.testing.assert_close(y, expected.eval()(x))
    with pytest.raises(RuntimeError, match="adapter 'third' has no eta and norm"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="adapter 'third' has no eta and norm"):
        model.train()(x)


def test_an_adapter_has_its_rule_on_a_layer_that_a_frozen_one_brought(tmp_path):
    plain_folder(tmp_path, "2")
    gradients = []
    for with_another in (False, True):
        model = get_allora_model(net(), config("0"))
        if with_another:
            model.load_adapter(tmp_path, "reference")
        model.add_adapter("b", ruled("0", "2"))
        model.set_adapter("b")
        own = {name: p for name, p in model.named_parameters() if ".b." in name}
        with torch.no_grad():
            for p in own.values():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        model.train()(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
        gradients.append({name: p.grad for name, p in own.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_adapter_on_a_layer_that_has_no_rule_is_refused(tmp_path):
    def net():
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))

    get_peft_model(net(), config("0", "1")).save_pretrained(tmp_path)
    model = get_allora_model(net(), config("1"))
    model.load_adapter(tmp_path, "reference")
    with pytest.raises(ValueError, match=r"the target '0' cannot be ALLoRA \(a layer Embedding of PEFT's"):
        model.add_adapter("b", ruled("0", "1"))
    assert list(model.peft_config) == ["default", "reference"]


@pytest.mark.parametrize("trainable", [True, False])
def test_a_second_adapter_is_loaded_as_the_arguments_say(trainable, tmp_path):
    get_allora_model(net().bfloat16(), config("0"), autocast_adapter_dtype=False).save_pretrained(tmp_path)
    model = get_allora_model(net().bfloat16(), config("0"), autocast_adapter_dtype=False)
    load_allora_model(model, tmp_path, "b", is_trainable=trainable, autocast_adapter_dtype=False)
    own = [p for name, p in model.named_parameters() if ".b." in name]
    assert [(p.dtype, p.requires_grad) for p in own] == [(torch.bfloat16, trainable)] * 2


class Reads(nn.Module):
    """Its attention reads the weight of out_proj itself."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_a_second_adapter_is_refused_where_the_first_would_be():
    model = get_allora_model(Reads(), config("out"))
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"out_proj: MultiheadAttention reads this layer's weight itself"):
        model.add_adapter("b", ruled("out", "out_proj"))
    assert {name: type(m) for name, m in model.named_modules()} == before and list(model.peft_config) == ["default"]


def test_no_fast_path_computes_past_a_second_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = get_allora_model(nn.ModuleDict({"encoder": encoder, "out": nn.Linear(8, 8)}), config("out"))
    model.add_adapter("b", ruled("linear1", "out", init_lora_weights=False))
    model.set_adapter("b")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        evaluated, trained = (call().base_model.model["encoder"](x) for call in (model.eval, model.train))
    torch.testing.assert_close(evaluated, trained)


def test_several_active_adapters_in_front_of_what_writes_in_place():
    model = get_allora_model(net(), config("0"))
    model.add_adapter("b", ruled("0"))
    model.base_model.set_adapter(["default", "b"])
    y = model.eval()(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="cannot train b, default by ALLoRA's rule"):
        y.sum().backward()


def test_what_is_refused_leaves_the_models_config():
    model = llama()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match="cannot be ALLoRA"):
        get_allora_model(model, config("q_proj", "embed_tokens", layer_replication=[[0, 2], [1, 2]]))
    assert model.config.to_dict() == before and len(model.model.layers) == 2


@pytest.mark.parametrize(
    "present, name", [("task10", "task1"), ("default", "b"), ("default", "lora"), ("my_sql", "sql")]
)
def test_a_name_that_is_a_part_of_anothers(present, name, tmp_path):
    get_allora_model(net(), config("0", init_lora_weights=False)).save_pretrained(tmp_path)
    model = get_allora_model(net(), config("0"), adapter_name=present)
    load_allora_model(model, tmp_path, name)
    loaded = {n: p for n, p in model.named_parameters() if f".{name}." in n}
    assert len(loaded) == 2 and all(p.any() for p in loaded.values())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit the model: it has no .*lora_[AB].{name}_too.weight"):
        load_allora_model(model, tmp_path, f"{name}_too")


@pytest.mark.parametrize(
    "adapt", [lambda m: apply_allora(m, r=2, target_modules=["0"]), lambda m: get_allora_model(m, config("0"))]
)
def test_no_layer_in_4_bits_is_packed_behind_an_adapter(adapt):
    """Through its packed weight no gradient would go."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(*(bitsandbytes.nn.Linear4bit(64, 64) for _ in range(2))).to("cpu")
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    _, behind = model
    adapt(model)
    assert not behind.support_avx512bf16_for_cpu
