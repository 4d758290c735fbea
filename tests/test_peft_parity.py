"""Whatever PEFT does with its LoRA layers, it does with ours: the same results, in ALLoRA models and in accelerated ones."""

import copy
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny_models import VOCAB, gpt2, llama, randomised

import allora_kernels
from allora_kernels.integrations.peft import (
    ALLoRAConfig,
    FusedLoraLinear,
    accelerate_lora,
    explain,
    get_allora_model,
    restore_lora,
)

IDS = torch.arange(14).reshape(2, 7) * 5 % VOCAB

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'"),
    pytest.mark.filterwarnings("ignore:Merging|Already unmerged|Adapter cannot be set|fan_in_fan_out"),
]


def lora(r=4, alpha=None, **settings):
    return LoraConfig(**{"r": r, "lora_alpha": alpha or r, "target_modules": ["q_proj", "v_proj"], **settings})


def second():
    return ALLoRAConfig(r=2, lora_alpha=2, target_modules=["q_proj", "o_proj"])


def models(kind):
    """A stock PeftModel and ours, in double precision, with two adapters of the same weights, the first of them active."""
    stock = peft.get_peft_model(llama().double(), lora())
    stock.add_adapter("second", lora(2, target_modules=["q_proj", "o_proj"]))
    randomised(stock).eval()
    if kind == "accelerated":
        ours = copy.deepcopy(stock)
        accelerate_lora(ours)
    else:
        ours = get_allora_model(llama().double(), lora())
        ours.add_adapter("second", second())
        ours.load_state_dict(stock.state_dict())
    return stock, ours.eval()


def of(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


def disabled(model, tmp_path):
    with model.disable_adapter():
        off = of(model)
    return off, of(model)


def merged(model, tmp_path):
    model.merge_adapter()
    on = of(model)
    with model.disable_adapter():
        off = of(model)
    model.merge_adapter(["second"])
    both = of(model)
    model.unmerge_adapter()
    return on, off, both, of(model)


def safely_merged(model, tmp_path):
    model.merge_adapter(safe_merge=True)
    return of(model)


def switched(model, tmp_path):
    model.set_adapter("second")
    return of(model)


def both_active(model, tmp_path):
    model.base_model.set_adapter(["default", "second"])
    both = of(model)
    model.base_model.set_adapter([])
    return both, of(model)


def mixed_batch(model, tmp_path):
    return tuple(of(model, adapter_names=names) for names in (["default", "second"], ["__base__", "default"]))


def weighted(model, tmp_path):
    model.add_weighted_adapter(["default", "default"], [0.5, 0.25], "sum", combination_type="linear")
    model.set_adapter("sum")
    return of(model)


def concatenated(model, tmp_path):
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "cat", combination_type="cat")
    model.set_adapter("cat")
    return of(model)


def deleted(model, tmp_path):
    model.delete_adapter("default")
    return of(model)


def rescaled(model, tmp_path):
    with rescale_adapter_scale(model, 0.3):
        small = of(model)
    return small, of(model)


def swapped(model, tmp_path):
    other = randomised(peft.get_peft_model(llama().double(), lora(alpha=8)), seed=2)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    return of(model)


def swapped_after_padding(model, tmp_path):
    other = randomised(peft.get_peft_model(llama().double(), lora(6, alpha=9)), seed=2)
    other.save_pretrained(tmp_path)
    model.delete_adapter("second")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = of(model)
    hotswap_adapter(model, tmp_path, "default")
    return before, of(model)


def loaded(model, tmp_path):
    randomised(peft.get_peft_model(llama().double(), lora(5, alpha=15)), seed=3).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    return of(model)


def unloaded(model, tmp_path):
    base = model.unload()
    assert not any(isinstance(m, Linear) for m in base.modules())
    return of(base)


def merged_and_unloaded(model, tmp_path):
    base = model.merge_and_unload()
    assert not any(isinstance(m, Linear) for m in base.modules())
    return of(base)


def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().double(), tmp_path, autocast_adapter_dtype=False)
    again.load_adapter(tmp_path / "second", "second")
    first = of(again)
    again.set_adapter("second")
    return first, of(again)


def copied(model, tmp_path):
    return of(copy.deepcopy(model)), of(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("kind", ["allora", "accelerated"])
@pytest.mark.parametrize(
    "act",
    [
        disabled, merged, safely_merged, switched, both_active, mixed_batch, weighted, concatenated, deleted, rescaled,
        swapped, swapped_after_padding, loaded, unloaded, merged_and_unloaded, saved, copied,
    ],
)  # fmt: skip
def test_results_are_pefts(kind, act, tmp_path):
    stock, ours = models(kind)
    assert not [why for why in explain(ours).pefts.values() if "0 active" not in why]
    torch.testing.assert_close(of(ours), of(stock), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(of(stock), of(llama().double()), atol=1e-2)
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()
    want, got = act(stock, tmp_path / "stock"), act(ours, tmp_path / "ours")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# --- accelerate_lora ------------------------------------------------------------------------------------------------


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "build, settings",
    [
        (llama, {"alpha": 16}),
        (llama, {"alpha": 16, "use_rslora": True, "target_modules": "all-linear"}),
        (llama, {"alpha": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
        (llama, {"init_lora_weights": "pissa"}),
        (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "alpha": 1}),
    ],
)
def test_an_accelerated_model_is_the_one_it_was(build, settings):
    model = randomised(peft.get_peft_model(build(), lora(**settings))).double()
    values, want = of(model), gradients(model)
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    report = accelerate_lora(model)
    assert len(report.ours) == len(want) // 2 and not report.pefts
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, ids)
    torch.testing.assert_close(of(model), values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(model), want, rtol=1e-9, atol=1e-12)
    assert accelerate_lora(model) == report
    restore_lora(model)
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
    torch.testing.assert_close(of(model), values, rtol=0, atol=0)


def test_training_goes_on_where_it_was():
    """Five steps of AdamW, the middle three accelerated, are those of a run that is not."""
    losses = []
    for accelerated in (False, True):
        model = randomised(peft.get_peft_model(llama().double(), lora(alpha=12))).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        run = []
        for step in range(5):
            if accelerated and step == 1:
                accelerate_lora(model)
            if accelerated and step == 4:
                restore_lora(model)
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[0][-1] < losses[0][0] - 0.01


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1: the kernels have no dropout"),
        ({"use_dora": True}, "a LoRA variant, DoraLinearVariant"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias=True"),
        ({"r": 300}, "rank 300 is over 256"),
        ({"target_modules": ["embed_tokens"]}, "Embedding has another forward pass"),
    ],
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_layers_that_stay_pefts_are_reported(settings, reason):
    model = peft.get_peft_model(llama(), lora(**settings))
    report = accelerate_lora(model)
    assert not report.ours and report.pefts and all(reason in why for why in report.pefts.values())
    assert reason in str(report) and not any(isinstance(m, FusedLoraLinear) for m in model.modules())


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers"):
        accelerate_lora(llama())


def test_what_comes_later_is_pefts_too():
    """Dropout, a trained base, a variant: put on an accelerated layer, they take PEFT's forward pass."""
    model = randomised(peft.get_peft_model(llama().double(), lora()))
    accelerate_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.requires_grad_(True)
    assert layer.explain().backend == "peft" and "the base layer is trained" in layer.explain().reason
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in gradients(model)
    layer.base_layer.weight.requires_grad_(False)
    assert layer.explain().backend == "eager" and "scaling=1, backend='eager'" in repr(layer)

    model.add_adapter("wet", lora(lora_dropout=0.9))
    model.set_adapter("wet")
    randomised(model).train()
    assert not torch.equal(of(model), of(model)) and "Dropout(p=0.9" in repr(layer)
    assert torch.equal(of(model.eval()), of(model)) and "PEFT's own" not in repr(layer)


def test_the_report_is_one_line_a_kind():
    model = peft.get_peft_model(llama(), lora(alpha=8, target_modules=["q_proj", "up_proj"]))
    assert str(explain(model)).splitlines() == [
        "0 of 4 LoRA layers fused; 4 run PEFT's own forward pass",
        "  2 x base_model.model.model.layers.*.self_attn.q_proj: PEFT's own layer: accelerate_lora(model) switches it",
        "  2 x base_model.model.model.layers.*.mlp.up_proj: PEFT's own layer: accelerate_lora(model) switches it",
    ]
    report = accelerate_lora(model)
    why = "cpu tensors (the kernels run on CUDA or ROCm devices, or under TRITON_INTERPRET=1)"
    assert str(report).splitlines() == [
        "0 of 4 LoRA layers fused; 0 run PEFT's own forward pass",
        f"  2 x base_model.model.model.layers.*.self_attn.q_proj: [16, 16], r=4, scaling=2, not fused: {why}",
        f"  2 x base_model.model.model.layers.*.mlp.up_proj: [32, 16], r=4, scaling=2, not fused: {why}",
    ]
    own = llama()
    allora_kernels.apply_allora(own, target_modules=["q_proj", "up_proj"])
    assert {what.partition("not fused: ")[2] for what in report.not_fused.values()} == {
        layer.reason for layer in allora_kernels.explain(own).layers.values() if layer.r is not None
    }
