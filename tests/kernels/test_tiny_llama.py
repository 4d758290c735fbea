"""A tiny Llama trained for 20 steps: the kernels, the eager backend and plain autograd see the same losses."""

import pytest
import torch

from allora_kernels import FusedALLoRALinear, reference
from allora_kernels.models.adapt import apply_allora

transformers = pytest.importorskip("transformers")

STEPS = 20


def train(device, norm, optimizer, lr):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    apply_allora(model, r=3, norm=norm)
    model.to(device)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_autograd(layer, x):
    return reference.allora_linear(
        x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, eta=layer.eta, norm=layer.norm
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [("row", torch.optim.AdamW, 0.02), ("entry", torch.optim.SGD, 1.0)], ids=["row", "entry"]
)
def test_the_same_losses_by_every_route(device, run, monkeypatch):
    kernels = train(device, *run)
    if device == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        eager = train(device, *run)
        torch.testing.assert_close(kernels, eager, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(FusedALLoRALinear, "forward", by_autograd)
    autograd = train(device, *run)
    torch.testing.assert_close(kernels, autograd, rtol=1e-4, atol=1e-5)
    assert kernels[-1] < kernels[0] - 0.1
