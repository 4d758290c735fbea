"""Adapters of experts on disk, in PEFT's layout for `target_parameters`: both ways, with experts that differ."""

import contextlib
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import (
    MIXTURES,
    VOCAB,
    adapted_mixture,
    logits,
    mixture,
    photograph,
    pretend_to_train,
    randomised,
    shared_mixture,
    tied_mixture,
)
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from allora_kernels import apply_allora, load_adapter, save_adapter
from allora_kernels.models.adapted import layers_of
from allora_kernels.models.expert_files import to_file

FAMILIES = list(MIXTURES)
IDS = torch.arange(14).reshape(2, 7) * 3 % VOCAB
EXPERTS = "model.layers.1.mlp.experts"
FILE = f"base_model.model.{EXPERTS}"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'"),
    # PEFT looks for such patterns among modules only, and heeds them all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


def adapted(family, **arguments):
    return adapted_mixture(family, **{"target_modules": ["q_proj", "kv_b_proj"], **arguments})


@pytest.fixture(autouse=True)
def _names_of_other_families():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_modules: the model has no module")
        yield


def load_with_peft(family, path, **arguments):
    """What stock PEFT makes of the adapter; anything it misses in the file is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        return PeftModel.from_pretrained(mixture(family), path, **arguments)


def peft_model(family, parameters=("experts.gate_up_proj", "experts.down_proj"), **arguments):
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 3, "target_modules": [], "target_parameters": list(parameters), **arguments}
    )
    return randomised(get_peft_model(mixture(family), config))


@pytest.fixture
def olmoe_is_renamed(monkeypatch):
    """As what renames Mistral-Large-4's old checkpoints matches the names of its own modules, experts too."""
    conversion_mapping.get_checkpoint_conversion_mapping("olmoe")  # Fills what it keeps.
    renaming = WeightRenaming(r"\.experts\.", ".mlp.experts.")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "olmoe", [renaming])


@pytest.mark.parametrize(
    "family, targets, experts, misread",
    [
        ("DeepseekV3", ["q_a_proj"], False, ()),
        ("DeepseekV3", ["q_a_proj"], True, ()),
        ("DeepseekV3", ["gate_proj", "up_proj", "down_proj"], False, ("0.mlp.gate_proj", "shared_experts.gate_proj")),
        ("DeepseekV3", ["gate_proj", "up_proj", "down_proj"], True, ("0.mlp.gate_proj", "shared_experts.gate_proj")),
        ("Laguna", ["q_proj", "0.mlp.gate_proj"], True, ()),
        ("Laguna", ["gate_proj"], True, ("shared_experts.gate_proj",)),
        ("Olmoe", ["q_proj"], True, ("experts.gate_up_proj", "experts.down_proj")),
    ],
)
def test_what_others_take_for_parts_of_older_checkpoints_is_warned_of(
    family, targets, experts, misread, tmp_path, olmoe_is_renamed
):
    model = adapted(family, target_modules=targets, experts=experts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapter(model, tmp_path)
    told = [str(w.message) for w in caught if "had such names in older checkpoints" in str(w.message)]
    assert len(told) == bool(misread) and all(name in message for message in told for name in misread)
    assert not any("q_proj" in message for message in told)
    again = mixture(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    rightly = pytest.raises((AssertionError, RuntimeError, UserWarning)) if misread else contextlib.nullcontext()
    with rightly:
        torch.testing.assert_close(logits(load_with_peft(family, tmp_path)), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rank_pattern": {"experts.down_proj": 2}},
        {"r": 1},
        {"experts": False, "target_parameters": ["gate_up_proj"]},
        {"experts": False, "target_parameters": ["1.mlp.experts.down_proj"], "target_modules": []},
    ],
)
def test_peft_computes_what_we_do_from_our_files(family, arguments, tmp_path):
    model = adapted(family, **arguments)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_with_peft(family, tmp_path)), logits(model), rtol=1e-4, atol=1e-5)
    again = mixture(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {
            "lora_alpha": 12,
            "use_rslora": True,
            "rank_pattern": {".*gate_up_proj": 5},
            "alpha_pattern": {".*down_proj": 1},
        },
        {"parameters": ["experts.down_proj"], "target_modules": ["o_proj"]},
    ],
)
def test_we_compute_what_peft_does_from_its_files(family, arguments, tmp_path):
    theirs = peft_model(family, **arguments)
    theirs.save_pretrained(tmp_path)
    ours = mixture(family)
    report = load_adapter(ours, tmp_path)
    assert report.experts
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - logits(mixture(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts(family, tmp_path):
    ours = adapted(family, norm=None)
    save_adapter(ours, tmp_path)
    theirs = load_with_peft(family, tmp_path, is_trainable=True)
    theirs.base_model.model.set_experts_implementation("eager")
    for model in (ours.double(), theirs.double()):
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {}
    for name, layer in layers_of(ours).items():
        for factor in ("lora_A", "lora_B"):
            grad = getattr(layer, factor).grad
            found[name, factor] = to_file(layer, factor, grad) if layer.grouped else grad
    expected = {}
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            name = name.replace(".base_layer", "") + (
                f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
            )
            for factor in ("lora_A", "lora_B"):
                expected[name, factor] = getattr(module, factor)["default"].weight.grad
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(
            found[key], grad, rtol=1e-6, atol=1e-7 * grad.abs().max().item(), msg=lambda m, key=key: f"{key}: {m}"
        )


def test_what_is_in_the_files(tmp_path):
    """lora_A over experts slowest, lora_B over experts fastest; the first parameter in the inner wrapper."""
    model = adapted("GptOss", target_modules=[])
    save_adapter(model, tmp_path)
    tensors, layer = load_file(tmp_path / "adapter_model.safetensors"), layers_of(model)
    inner, outer = layer[f"{EXPERTS}.gate_up_proj"], layer[f"{EXPERTS}.down_proj"]
    assert {key for key in tensors if ".1." in key} == {
        f"{FILE}{wrapper}.{factor}.weight" for wrapper in (".base_layer", "") for factor in ("lora_A", "lora_B")
    }
    for wrapper, adapter in ((".base_layer", inner), ("", outer)):
        a, b = (tensors[f"{FILE}{wrapper}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        for e in range(4):
            for j in range(3):
                assert torch.equal(a[e * 3 + j], adapter.lora_A[e, j])
                assert torch.equal(b[:, j * 4 + e], adapter.lora_B[e, :, j])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(layer) and config["target_modules"] == []


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_experts_in_another_order_are_another_model(factor, tmp_path):
    """That the tests above would see it: the same shapes, with each factor's other order."""
    model = adapted("Qwen3Moe", target_modules=[])
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, t in tensors.items():
        if key.endswith(f"{factor}.weight"):
            swapped = (
                t.unflatten(0, (4, 3)).transpose(0, 1) if factor == "lora_A" else t.unflatten(1, (3, 4)).transpose(1, 2)
            )
            tensors[key] = swapped.reshape(t.shape).contiguous()
    save_file(tensors, file)
    again = mixture("Qwen3Moe")
    load_adapter(again, tmp_path)
    assert (logits(again) - logits(model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(load_with_peft("Qwen3Moe", tmp_path)), logits(again), rtol=1e-4, atol=1e-5)


def test_a_model_with_adapters_loads_into_them_and_keeps_its_rule(tmp_path):
    peft_model("Mixtral").save_pretrained(tmp_path)
    model = mixture("Mixtral")
    apply_allora(model, r=3, experts=True, target_modules=[], norm="token", eta=0.5)
    load_adapter(model, tmp_path)
    assert {(layer.norm, layer.eta) for layer in layers_of(model).values()} == {("token", 0.5)}
    plain = mixture("Mixtral")
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    other = mixture("Mixtral")
    apply_allora(other, r=2, experts=True, target_modules=[])
    before = photograph(other)
    with pytest.raises(ValueError, match=r"down_proj has r=2 in the model and r=3 in the file"):
        load_adapter(other, tmp_path)
    assert photograph(other) == before


def test_save_pretrained_writes_the_adapter(tmp_path):
    mixture("Olmoe").save_pretrained(tmp_path / "base")
    model = type(mixture("Olmoe")).from_pretrained(tmp_path / "base").eval()
    apply_allora(model, r=3, experts=True)
    pretend_to_train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = type(model).from_pretrained(tmp_path / "base").eval()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "arguments, count",
    [
        ({"experts": True}, 4),
        ({"target_parameters": ["experts.down_proj"]}, 2),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, 1),
    ],
)
def test_experts_that_share_their_parameters_have_adapters_of_their_own(arguments, count, tmp_path):
    """As those of DiffusionGemma's encoder and decoder."""
    model = tied_mixture()
    assert len(apply_allora(model, r=3, target_modules=[], **arguments).experts) == count
    pretend_to_train(model)
    save_adapter(model, tmp_path)
    again = tied_mixture()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(tied_mixture(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


# --- refused ------------------------------------------------------------------------------------------------------------


def edit_config(path, **settings):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(family, path, match):
    model = mixture(family)
    before = photograph(model)
    with pytest.raises(ValueError, match=match):
        load_adapter(model, path)
    assert photograph(model) == before


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_adapter(adapted("Qwen3Moe", target_modules=[]), tmp_path)
    refused("Mixtral", tmp_path, r"gate_up_proj\.lora_A must be \[9, 16\], got \[12, 16\]")
    edit_config(tmp_path, target_parameters=["experts.down_projj"])
    refused("Qwen3Moe", tmp_path, r"no parameter 'experts\.down_projj'; did you mean 'experts\.down_proj'")
    edit_config(tmp_path, target_parameters=["experts.down_proj"])
    refused("Qwen3Moe", tmp_path, r"it adapts model\.layers\.0\.mlp\.experts\.base_layer: not a layer of the model")
    edit_config(tmp_path, target_parameters="experts.down_proj")
    refused("Qwen3Moe", tmp_path, "target_parameters must be a list of names")


def test_files_of_a_peft_that_knew_no_layout_are_refused(tmp_path):
    """Before 0.20 it took the second dimension for the input, whatever the model does."""
    save_adapter(adapted("Qwen3Moe", target_modules=[]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    turned = {}
    for key, t in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            turned[key] = b.unflatten(1, (3, 4)).permute(2, 1, 0).reshape(12, -1).contiguous()
            turned[key.replace("lora_A", "lora_B")] = (
                t.unflatten(0, (4, 3)).permute(2, 1, 0).reshape(-1, 12).contiguous()
            )
    save_file(turned, file)
    refused(
        "Qwen3Moe",
        tmp_path,
        r"down_proj: its in- and output are the other way round, as PEFT before 0\.20 saved experts",
    )


@pytest.mark.parametrize("version, known", [(None, False), ("0.19.1", False), ("0.20.0", True), ("1.0.0", True)])
def test_square_experts_of_an_unknown_peft_are_refused(version, known, tmp_path):
    """Nothing in the file would tell which way round they are."""
    square = {"moe_intermediate_size": 8}  # gate_up_proj is [4, 16, 16]
    model = mixture("Qwen3Moe", **square)
    apply_allora(model, r=3, target_modules=[], target_parameters=["gate_up_proj"], norm=None)
    pretend_to_train(model)
    save_adapter(model, tmp_path)
    load_adapter(again := mixture("Qwen3Moe", **square), tmp_path)
    assert torch.equal(logits(again), logits(model))
    file = tmp_path / "adapter_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if "allora" not in key}
    file.write_text(json.dumps(config | {"peft_version": version}))
    other = mixture("Qwen3Moe", **square)
    if known:
        load_adapter(other, tmp_path)
        assert torch.equal(logits(other), logits(model))
    else:
        with pytest.raises(ValueError, match="may be the other way round"):
            load_adapter(other, tmp_path)


def test_experts_that_layers_share_are_warned_of(tmp_path):
    model = shared_mixture()
    apply_allora(model, r=3, target_modules=[], experts=True)
    pretend_to_train(model)
    with pytest.warns(UserWarning, match=r"under their first name only: .*layers\.0\.mlp\.experts\.gate_up_proj"):
        save_adapter(model, tmp_path)
    again = shared_mixture()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_what_target_parameters_cannot_name_alone_is_not_saved(tied, tmp_path):
    """PEFT matches ends of names: a parameter whose name is the end of another's cannot be adapted without it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.other = mixture("Mixtral").model.layers[0].mlp, nn.Module()
            self.other.mlp = mixture("Mixtral").model.layers[0].mlp
            if tied:
                self.other.mlp.experts._parameters.update(self.mlp.experts._parameters)

    model = Two()
    apply_allora(model, r=2, target_modules=[], experts=True, exclude_modules=r"other\..*")
    with pytest.raises(
        ValueError, match=r"cannot name mlp\.experts\.gate_up_proj without other\.mlp\.experts\.gate_up_proj"
    ):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
