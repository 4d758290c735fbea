"""LoRA+: lora_B at a learning rate of its own, as in PEFT."""

import peft
import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from tiny_models import VOCAB, llama, mixture

from allora_kernels import adapter_layers, adapter_parameter_groups, adapter_parameters, add_adapter, apply_allora
from allora_kernels.integrations.peft import get_allora_model

IDS = torch.arange(14).reshape(2, 7) * 5 % VOCAB


def rates(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def trained(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return [p.detach() for name, p in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("experts", [False, True])
def test_every_factor_is_in_one_group_and_b_has_the_ratio(experts):
    model = mixture("Mixtral") if experts else llama()
    apply_allora(model, r=3, experts=experts)
    a, b = adapter_parameter_groups(model, 1e-3, loraplus_lr_ratio=16)
    layers = adapter_layers(model).values()
    assert [id(p) for p in a["params"]] == [id(layer.lora_A) for layer in layers] and a["lr"] == 1e-3
    assert [id(p) for p in b["params"]] == [id(layer.lora_B) for layer in layers] and b["lr"] == 16e-3
    assert {id(p) for p in a["params"] + b["params"]} == {id(p) for p in adapter_parameters(model)}
    assert [group["lr"] for group in adapter_parameter_groups(model, 0.5)] == [0.5, 0.5]


def test_it_trains_as_pefts_optimizer_trains_pefts_lora():
    ours, stock = (
        llama().double(),
        peft.get_peft_model(llama().double(), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")),
    )
    apply_allora(ours, r=4, norm=None)
    factors = [p for name, p in stock.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for p, q in zip(adapter_parameters(ours), factors, strict=True):
            p.copy_(q)
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 8.0}
    found = trained(ours, torch.optim.AdamW(adapter_parameter_groups(ours, **settings), weight_decay=0.0))
    for p, q in zip(
        found, trained(stock, create_loraplus_optimizer(stock, torch.optim.AdamW, **settings)), strict=True
    ):
        torch.testing.assert_close(p, q)


def test_pefts_optimizer_gives_our_layers_the_same_rates():
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 8.0}
    model = llama()
    apply_allora(model, r=4)
    mine = rates(torch.optim.AdamW(adapter_parameter_groups(model, **settings)))
    assert rates(create_loraplus_optimizer(model, torch.optim.AdamW, **settings)) == mine
    wrapped = get_allora_model(llama(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    found = rates(create_loraplus_optimizer(wrapped, torch.optim.AdamW, **settings))
    assert found == {
        id(p): 8e-2 if "lora_B" in name else 1e-2 for name, p in wrapped.named_parameters() if p.requires_grad
    }


def test_one_adapter_of_several():
    model = llama()
    apply_allora(model, r=4, adapter_name="first")
    add_adapter(model, "second", r=2)
    groups = adapter_parameter_groups(model, 1e-3, adapter="second")
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in adapter_parameters(model, "second")}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: adapter_parameter_groups(m, 0.0), ValueError, "lr must be finite and > 0, got 0.0"),
        (lambda m: adapter_parameter_groups(m, "1e-3"), TypeError, "lr must be a number, got str"),
        (lambda m: adapter_parameter_groups(m, 1e-3, loraplus_lr_ratio=-1), ValueError, "loraplus_lr_ratio must be finite"),
        (lambda m: adapter_parameter_groups(m, 1e-3, adapter="defalt"), ValueError, "did you mean 'default'"),
        (lambda m: adapter_parameter_groups(m.lm_head, 1e-3), ValueError, "for a PeftModel there is peft"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    model = llama()
    apply_allora(model, r=4)
    with pytest.raises(error, match=message):
        call(model)
