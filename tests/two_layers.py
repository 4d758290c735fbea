"""A model of two adapted layers, its training in one process or several, and what the trainings leave compared."""

import torch
import torch.distributed as dist
from torch import nn

from allora_kernels import apply_allora

K, HIDDEN, N, R = 12, 20, 9, 3
ROWS = 8


def adapted(bare, norm="row"):
    """The layers of `bare` with adapters that are not zero."""
    apply_allora(bare, r=R, norm=norm)
    for layer in (bare[0], bare[2]):
        nn.init.normal_(layer.lora_B)
    return bare


def make_model(norm="row", dtype=torch.float32, device="cpu"):
    """The same each time."""
    torch.manual_seed(0)
    return adapted(nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N)).to(device, dtype), norm)


def batch(rank=None, features=K):
    """The whole batch, or the part of one process."""
    x = torch.randn(ROWS, features, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x.chunk(dist.get_world_size())[rank]


def trained(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def whole(t):
    """What is cut over processes, put together."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def train(model, x, steps=2, backward=lambda loss: loss.backward(), prepare=lambda optimizer: optimizer):
    """The trained parameters' gradients and values after some steps, whole."""
    optimizer = prepare(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model(x).float().square().mean())
        optimizer.step()
    found = trained(model) | {f"d{name}": p.grad for name, p in trained(model).items()}
    return {name: whole(t).clone() for name, t in found.items()}


def assert_same(found, expected, **tolerances):
    """Tensors by name."""
    assert expected and found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, **tolerances, msg=lambda m, name=name: f"{name}: {m}")
