"""Per-sample gradients in two processes, which have a half of the batch each: DistributedDataParallel and FSDP2."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

from processes import run_checks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from allora_kernels import FusedALLoRALinear, per_sample

WORLD, B = 2, 4


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(FusedALLoRALinear(7, 6, r=3), nn.Tanh(), FusedALLoRALinear(6, 5, r=2))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def replicated():
    return DistributedDataParallel(make_model())


def held():
    return nn.Sequential(replicated(), nn.Identity())


def sharded(shape=(WORLD,), **settings):
    """Factors of 3 rows and of 5, which two processes cannot share evenly."""
    model = make_model()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, **settings)
    return model


def kept_whole():
    model = sharded(reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    return model


def make_data():
    return torch.randn(WORLD * B, 3, 7, generator=torch.Generator().manual_seed(1))


def grads(model):
    found = [p.grad for p in model.parameters() if p.requires_grad]
    return [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in found]


def check(make, norms_only, tolerance, folder):
    rank, model = dist.get_rank(), make()
    own = slice(rank * B, (rank + 1) * B)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)

    alone = make_model()
    with per_sample.record(alone):
        alone(make_data()).square().sum().backward()
    want, wanted = per_sample.norms(alone), grads(alone)
    per_sample.clip_(alone, 1.0)
    clipped = grads(alone)

    for without in (False, True):
        model.zero_grad()
        with per_sample.record(model, norms_only=norms_only):
            model(make_data()[own]).square().sum().backward()
        for ours, whole in zip(grads(model), wanted, strict=True):
            close(ours, whole / WORLD)
        # There may be gradients that clip_ writes into, or none.
        if without:
            model.zero_grad()
        norms = per_sample.clip_(model, 1.0)
        assert norms.dtype == torch.float32
        close(norms, want[own])
        for ours, whole in zip(grads(model), clipped, strict=True):
            close(ours, whole / WORLD)


class Dropping(nn.Module):
    """Of two layers it leaves `drop` out."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop
        torch.manual_seed(0)
        self.layers = nn.ModuleList(FusedALLoRALinear(7, 7, r=2) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.lora_B)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if i == self.drop else layer(x)
        return x


def check_other_layers_in_each_process(folder):
    rank, x = dist.get_rank(), make_data()[:, 0]
    want = {}
    for drop in range(WORLD):
        alone = Dropping(drop)
        with per_sample.record(alone):
            alone(x[drop * B : (drop + 1) * B]).square().sum().backward()
        per_sample.clip_(alone, 1.0)
        want |= {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    model = DistributedDataParallel(Dropping(rank), find_unused_parameters=True)
    with per_sample.record(model), model.no_sync():
        model(x[rank * B : (rank + 1) * B]).square().sum().backward()
    per_sample.clip_(model, 1.0)
    assert len(want) == 4
    for name, grad in want.items():
        torch.testing.assert_close(model.module.get_parameter(name).grad, grad / WORLD)


def check_gradients_kept_back(folder):
    model, x = sharded(), make_data()
    for _ in range(2):
        with per_sample.record(model):
            for last, part in ((False, x[:3]), (True, x[3:])):
                model.set_requires_gradient_sync(last)
                loss = model(part).square().sum()
                if not last:
                    model.zero_grad()
                loss.backward()
        assert per_sample.clip_(model, 1.0).shape == (2 * B,)
        model.set_requires_gradient_sync(False)
        with (
            pytest.raises(RuntimeError, match="FSDP2 has not averaged the recorded gradients"),
            per_sample.record(model),
        ):
            model(x).square().sum().backward()
        # What was kept back is let go here, and the next ones are added to gradients that are there.
        model.set_requires_gradient_sync(True)
        model(x).square().sum().backward()


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


@pytest.mark.parametrize("norms_only", [False, True])
def test_two_processes(tmp_path, norms_only):
    ways = {
        "DistributedDataParallel": (replicated, 1e-5),
        "DistributedDataParallel in a module": (held, 1e-5),
        "FSDP2": (sharded, 1e-5),
        "FSDP2, parameters kept whole": (kept_whole, 1e-5),
        "FSDP2, replicas": (functools.partial(sharded, shape=(WORLD, 1)), 1e-5),
        "FSDP2, bf16": (functools.partial(sharded, mp_policy=BF16), 0.05),
    }
    checks = {name: functools.partial(check, make, norms_only, tolerance) for name, (make, tolerance) in ways.items()}
    checks |= {"kept back": check_gradients_kept_back, "other layers": check_other_layers_in_each_process}
    run_checks(WORLD, checks, tmp_path)
