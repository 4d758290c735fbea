"""Several adapters in one batch, in two processes under DistributedDataParallel."""

import functools

import pytest
import torch
import torch.distributed as dist
from processes import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from allora_kernels import (
    adapter_parameters,
    adapter_rows,
    add_adapter,
    apply_allora,
    load_adapter,
    per_sample,
    remove_adapter,
    save_adapter,
    save_adapters_async,
    set_adapter,
)

NAMES = [["a", "b", None], ["b", "b", "a"]]


class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.call = functools.partial(checkpoint, use_reentrant=False) if checkpointed else lambda f, x: f(x)

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer, x).tanh()
        return x


def make(checkpointed=False):
    model = Net(checkpointed)
    apply_allora(model, r=2, adapter_name="a")
    add_adapter(model, "b", r=3, norm="token")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batches():
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in adapter_parameters(model)]


def whole(names):
    """The gradients of both processes' batches in one, as the mean of the two."""
    model = make()
    with adapter_rows(model, [*names[0], *names[1]]):
        (model(batches().flatten(0, 1)).square().sum() / 2).backward()
    return grads(model)


def check_mixed(folder, checkpointed):
    model = DistributedDataParallel(make(checkpointed))
    with adapter_rows(model, NAMES[dist.get_rank()]):
        loss = model(batches()[dist.get_rank()]).square().sum()
    loss.backward()
    for found, want in zip(grads(model.module), whole(NAMES), strict=True):
        torch.testing.assert_close(found, want)


def check_names_that_differ(folder):
    names = [["a", "b", "a"], ["b", "b", None]]
    model = DistributedDataParallel(make(), find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        with adapter_rows(model, names[dist.get_rank()]):
            loss = model(batches()[dist.get_rank()]).square().sum()
        loss.backward()
        for found, want in zip(grads(model.module), whole(names), strict=True):
            torch.testing.assert_close(found, want)
    set_adapter(model, "b")
    assert model.module.layers[0].adapter_name == "b"


def check_clipped_samples(folder):
    names = [["a", "b", "a"], ["b", "b", None]]
    rank, alone = dist.get_rank(), make()
    with per_sample.record(alone), adapter_rows(alone, [*names[0], *names[1]]):
        alone(batches().flatten(0, 1)).square().sum().backward()
    norms = per_sample.clip_(alone, 1.0)
    assert (norms > 1).any()
    model = DistributedDataParallel(make(), find_unused_parameters=True)
    with per_sample.record(model), adapter_rows(model, names[rank]):
        model(batches()[rank]).square().sum().backward()
    # The second process has no samples of "a", and the gradient that the first brought it.
    torch.testing.assert_close(per_sample.clip_(model, 1.0), norms[3 * rank : 3 * rank + 3])
    for found, want in zip(grads(model.module), grads(alone), strict=True):
        torch.testing.assert_close(found, want / 2)


def check_gradients_that_were_not_averaged_before(folder):
    """Each process has one adapter's gradients, and another's than the other process."""
    names, rank, alone = [["a"] * 3, ["b"] * 3], dist.get_rank(), make()
    with per_sample.record(alone), adapter_rows(alone, [*names[0], *names[1]]):
        alone(batches().flatten(0, 1)).square().sum().backward()
    per_sample.clip_(alone, 1.0)
    model = DistributedDataParallel(make(), find_unused_parameters=True)
    with per_sample.record(model), model.no_sync(), adapter_rows(model, names[rank]):
        model(batches()[rank]).square().sum().backward()
    per_sample.clip_(model, 1.0)
    for found, want in zip(grads(model.module), grads(alone), strict=True):
        torch.testing.assert_close(found, want / 2)


def check_unused_ones_are_refused(folder):
    model = DistributedDataParallel(make())
    x = batches()[dist.get_rank()]
    with adapter_rows(model, ["a"] * 3):
        model(x).square().sum().backward()
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            model(x)


def check_sharded_ones_are_refused(folder):
    model = make()
    for layer in model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for call in (
        lambda: add_adapter(model, "c"),
        lambda: set_adapter(model, "b"),
        lambda: remove_adapter(model, "b"),
        lambda: adapter_rows(model, NAMES[0]).__enter__(),
        lambda: save_adapters_async(model, {"a": folder / "a"}),
    ):
        with pytest.raises(ValueError, match="is sharded"):
            call()
    assert not (folder / "a").exists()


def check_what_the_wrapper_would_not_see_is_refused(folder):
    own = folder / f"saved-{dist.get_rank()}"
    save_adapter(make(), own, adapter="b")
    model = DistributedDataParallel(make())
    names = [name for name, _ in model.named_parameters()]
    for call in (
        lambda: add_adapter(model, "c"),
        lambda: add_adapter(nn.Sequential(model), "c"),
        lambda: load_adapter(model, own, adapter="c"),
    ):
        with pytest.raises(ValueError, match="put adapters on the model before DistributedDataParallel wraps it"):
            call()
    load_adapter(model, own, adapter="b")
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_train_what_one_does(tmp_path):
    checks = {
        "mixed": functools.partial(check_mixed, checkpointed=False),
        "checkpointed": functools.partial(check_mixed, checkpointed=True),
        "names that differ": check_names_that_differ,
        "clipped": check_clipped_samples,
        "not averaged": check_gradients_that_were_not_averaged_before,
        "unused": check_unused_ones_are_refused,
        "added": check_what_the_wrapper_would_not_see_is_refused,
        "sharded": check_sharded_ones_are_refused,
    }
    run_checks(2, checks, tmp_path)
