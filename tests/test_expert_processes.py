"""Adapters on experts in two processes: DistributedDataParallel and FSDP2 train what one process does."""

import pytest
import torch
import torch.distributed as dist
from tiny_models import VOCAB, mixture, pretend_to_train
from torch.nn.parallel import DistributedDataParallel

from allora_kernels import adapter_parameters, apply_allora, load_adapter, save_adapter

if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)
from processes import run_checks
from torch.distributed.fsdp import fully_shard

IDS = torch.arange(28).reshape(4, 7) * 3 % VOCAB


def adapted():
    model = mixture("Qwen3Moe", num_experts=5)  # which two processes cannot halve
    apply_allora(model, r=3, experts=True, target_modules=["q_proj"])
    return pretend_to_train(model)


def step(model, ids=IDS):
    """One step of SGD on the mean over `ids`; the logits after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, use_cache=False).logits.square().mean().mul(100).backward()
    optimizer.step()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def mine():
    return IDS[dist.get_rank() * 2 :][:2]


def data_parallel(folder):
    want = step(adapted())
    model = DistributedDataParallel(adapted())
    torch.testing.assert_close(step(model, mine()), want, rtol=1e-4, atol=1e-5)


def sharded(folder):
    want = step(adapted())
    model = adapted()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.testing.assert_close(step(model, mine()), want, rtol=1e-4, atol=1e-5)
    assert all(p.to_local().numel() < p.numel() for p in adapter_parameters(model))
    save_adapter(model, folder / "adapter")
    plain = mixture("Qwen3Moe", num_experts=5)
    load_adapter(plain, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)
    again = adapted()
    for layer in again.model.layers:
        fully_shard(layer)
    fully_shard(again)
    load_adapter(again, folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


CHECKS = {check.__name__: check for check in (data_parallel, sharded)}


def test_two_processes_train_what_one_does(tmp_path):
    run_checks(2, CHECKS, tmp_path)
