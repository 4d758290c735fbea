"""Adapters sharded by FSDP2: saved whole, loaded into any sharding, and no process left waiting for one that failed."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from allora_kernels import (
    adapter_layers,
    add_adapter,
    apply_allora,
    disable_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
)

if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)
from processes import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

FILES = ["adapter_config.json", "adapter_model.safetensors"]


class Net(nn.Module):
    """Odd sizes, and rank 1 in one layer: the last process has less than the others, or nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(trained=True, **settings):
    model = Net()
    apply_allora(
        model,
        **{"r": 3, "target_modules": r"blocks.*", "modules_to_save": ["head"], "rank_pattern": {"0.0": 1}} | settings,
    )
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator))
    return model


def shard(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


X = torch.linspace(-1, 1, 28).reshape(4, 7)


def step(model):
    """The same data in each process, so that the mean over processes is one process's gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def run(action, folder, world):
    spawn(work, world, str(folder), action, nprocs=world)


def work(rank, world, folder, action):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    try:
        action(rank, world, Path(folder))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def save_and_load(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    model = shard(make(), mesh)
    step(model)
    with torch.no_grad(), disable_adapters(model):
        torch.testing.assert_close(model.blocks[0](X), Net().blocks[0](X))
    # Where the others think that it goes does not matter, and when one returns the files are there.
    save_adapter(model, folder / f"adapter-{rank}")
    assert sorted(os.listdir(folder / "adapter-0")) == FILES and not (folder / "adapter-1").exists()
    load(rank, world, folder)

    # Replicated over one dimension of the mesh, sharded over the other.
    hybrid = shard(make(trained=False), init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")))
    load_adapter(hybrid, folder / "one")
    save_adapter(hybrid, folder / "hybrid")
    held_whole_after_an_evaluation(rank, mesh, folder)
    merging_is_refused(mesh)
    fail(rank, mesh, folder)


def load(rank, world, folder):
    model = shard(make(trained=False), init_device_mesh("cpu", (world,)))
    load_adapter(model, folder / "adapter-0")
    with torch.no_grad():
        torch.save(model(X), folder / f"y-{world}-{rank}.pt")
    save_adapter(model, folder / f"again-{world}")
    load_adapter(model, folder / "one")
    save_adapter(model, folder / f"one-{world}")


def held_whole_after_an_evaluation(rank, mesh, folder):
    # To ask a module saved whole for its state cuts all up again.
    if rank == 0:
        save_adapter(make(modules_to_save=None), folder / "not-whole")
    dist.barrier()
    model = fully_shard(make(trained=False, modules_to_save=None), mesh=mesh)

    def evaluate():
        with torch.no_grad():
            return model(X)

    evaluate()
    load_adapter(model, folder / "not-whole")
    loaded = evaluate()
    model(X).square().mean().backward()
    assert torch.equal(evaluate(), loaded)
    save_adapter(model, folder / f"held-{rank}")
    assert contents(folder / "held-0") == contents(folder / "not-whole") and not (folder / "held-1").exists()
    evaluate()
    with pytest.raises(ValueError, match="is sharded, and add_adapter knows of whole adapters only"):
        add_adapter(model, "b")


def merging_is_refused(mesh):
    def tensor_parallel(model):
        return parallelize_module(model, mesh, {"blocks.0.0": ColwiseParallel()})

    def sharded_but_for_the_adapters(model):
        adapters = {p for layer in adapter_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
        return fully_shard(model, mesh=mesh, ignored_params=adapters)

    def held_whole(model):
        fully_shard(model, mesh=mesh, reshard_after_forward=False)(X)
        return model

    flat = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    ways = {
        "FSDP2": (partial(shard, mesh=mesh), sharded_but_for_the_adapters, held_whole),
        "FSDP1": (flat,),
        "tensor parallelism": (tensor_parallel,),
    }
    for by, makers in ways.items():
        for make_sharded in makers:
            model = make_sharded(make())
            for keep in (False, True):
                with pytest.raises(ValueError, match=f"are cut up by {by}: save_adapter, load it in one process"):
                    merge_adapter(model, keep=keep)
            assert len(adapter_layers(model)) == 4
    with pytest.raises(ValueError, match="the layer is cut up by FSDP2 or tensor parallelism: save the adapter"):
        model.blocks[0][0].merge()
    with pytest.raises(ValueError, match=r"weight is frozen in ALLoRA .* FSDP1, .* shard by fully_shard \(FSDP2\)"):
        flat(make())(X)


def fail(rank, mesh, folder):
    model = shard(make(), mesh)
    messages = []

    def attempt(path):
        try:
            save_adapter(model, path)
        except (ValueError, OSError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append(None)

    def full(_):
        raise OSError("no space left on device")

    # Process 1 alone has something else there.
    (folder / f"there-{rank}").touch() if rank == 1 else None
    attempt(folder / f"there-{rank}")
    # The disk of process 0 is full.
    real, os.fsync = os.fsync, full if rank == 0 else os.fsync
    attempt(folder / "full")
    os.fsync = real
    # The processes do not agree.
    layer = next(iter(adapter_layers(model).values()))
    layer.eta = 3.0 if rank == 1 else 2.0
    attempt(folder / "eta")
    layer.eta = 2.0
    attempt(folder / "well")

    before = [p.to_local().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(model, folder / "other")
    assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), before))
    with pytest.raises(ValueError, match="sharded"):
        load_adapter(shard(Net(), mesh), folder / "other")
    (folder / f"messages-{rank}.json").write_text(json.dumps(messages))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes saved, and three made of it."""
    folder = tmp_path_factory.mktemp("sharded")
    save_adapter(make(), folder / "one")
    save_adapter(make(r=2, rank_pattern=None), folder / "other")
    run(save_and_load, folder, 2)
    run(load, folder, 3)
    return folder


def test_a_trained_model_is_saved_as_one_process_would(folder):
    single, want = Net(), make()
    step(want)
    load_adapter(single, folder / "adapter-0")
    for (name, p), q in zip(single.named_parameters(), want.parameters()):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_loads_it(folder, world):
    single = Net()
    load_adapter(single, folder / "adapter-0")
    for rank in range(world):
        torch.testing.assert_close(torch.load(folder / f"y-{world}-{rank}.pt"), single(X).detach())
    assert contents(folder / f"again-{world}") == contents(folder / "adapter-0")


@pytest.mark.parametrize("name", ["one-2", "one-3", "hybrid"])
def test_what_one_process_saved_is_the_same_after_any_sharding(folder, name):
    assert contents(folder / name) == contents(folder / "one")


def test_an_error_in_one_process_is_one_in_all(folder):
    (there, full, eta, well), (there_1, full_1, eta_1, well_1) = (
        json.loads((folder / f"messages-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert there_1.startswith("ValueError: path must be a folder")
    assert there.startswith("RuntimeError: process 1 failed: ValueError: path must be a folder")
    assert full == "OSError: no space left on device"
    assert full_1 == "RuntimeError: process 0 failed: OSError: no space left on device"
    assert eta_1.startswith("ValueError: the file holds one (eta, norm)")
    assert eta.startswith("RuntimeError: process 1 failed: ValueError: the file holds one (eta, norm)")
    assert well is None and well_1 is None
    assert contents(folder / "well") == contents(folder / "one")
    assert contents(folder / "full") == {} and not (folder / "eta").exists() and not (folder / "there-0").exists()


def test_pieces_that_are_no_dtensors_are_refused(tmp_path):
    model = make()
    layer = adapter_layers(model)["blocks.1.0"]
    layer.lora_A = nn.Parameter(layer.lora_A.data.flatten()[:7])
    with pytest.raises(ValueError, match=r"lora_A is \[7\] and not \[3, 7\]: gather its shards first"):
        save_adapter(model, tmp_path / "adapter")
