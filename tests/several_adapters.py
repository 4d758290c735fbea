"""Models with several adapters, and what each of them does alone."""

import torch
from tiny_models import VOCAB, llama
from torch import nn

from allora_kernels import (
    active_adapter,
    adapter_parameters,
    add_adapter,
    apply_allora,
    disable_adapters,
    set_adapter,
)

RULES = {"default": {"r": 3}, "wide": {"r": 5, "eta": 1.0, "norm": "matrix"}, "plain": {"r": 1, "norm": None}}
NAMES = ["wide", None, "default", "wide", "plain", "default"]
IDS = torch.arange(6 * 7).reshape(6, 7) * 5 % VOCAB


def with_values(model):
    """Random values in every adapter, whichever is active."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def several(build=llama, rules=RULES, **arguments):
    """A model with an adapter for each of `rules`, whose values are random and the same at every call."""
    model = build()
    (first, rule), *others = rules.items()
    apply_allora(model, **rule, adapter_name=first, **arguments)
    for name, rule in others:
        add_adapter(model, name, **rule)
    return with_values(model)


def alone(model, name, ids=IDS, **inputs):
    """What `model` computes with one adapter, or with none."""
    if name is None:
        with disable_adapters(model):
            return model(input_ids=ids, **inputs).logits
    before = active_adapter(model)
    set_adapter(model, name)
    y = model(input_ids=ids, **inputs).logits
    set_adapter(model, before)
    return y


def gradients(model, name):
    return [None if p.grad is None else p.grad.clone() for p in adapter_parameters(model, name)]


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3))
        self.wrap = wrap

    def forward(self, x):
        for block in self.blocks:
            x = self.wrap(block, x).tanh()
        return x


def plainly(function, x):
    return function(x)
