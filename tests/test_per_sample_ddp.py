"""Per-sample gradients on two processes under DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allora_kernels import FusedALLoRALinear, per_sample

WORLD, B = 2, 4


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(FusedALLoRALinear(7, 6, r=3), nn.Tanh(), FusedALLoRALinear(6, 5, r=2))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def make_data():
    return torch.randn(WORLD * B, 3, 7, generator=torch.Generator().manual_seed(1))


def grads(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def work(rank, path, norms_only):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    ddp = DistributedDataParallel(make_model())
    x = make_data()[rank * B : (rank + 1) * B]
    with per_sample.record(ddp, norms_only=norms_only):
        ddp(x).square().sum().backward()
    averaged, norms = grads(ddp), per_sample.norms(ddp)
    per_sample.clip_(ddp, 1.0)

    alone = make_model()
    with per_sample.record(alone):
        alone(make_data()).square().sum().backward()
    torch.testing.assert_close(norms, per_sample.norms(alone)[rank * B : (rank + 1) * B])
    for ours, whole in zip(averaged, grads(alone)):
        torch.testing.assert_close(ours, whole / WORLD)
    per_sample.clip_(alone, 1.0)
    for ours, whole in zip(grads(ddp), grads(alone)):
        torch.testing.assert_close(ours, whole / WORLD)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("norms_only", [False, True])
def test_two_processes(tmp_path, norms_only):
    mp.spawn(work, args=(tmp_path / "store", norms_only), nprocs=WORLD)
