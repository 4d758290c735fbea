"""Tensors that several processes hold a part of each (FSDP2, tensor parallelism, ZeRO-3): gathered to save, cut up to load."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer.sharding import by_fsdp2, is_sharded, reshard
from ..layer.zero import filled, is_cut_up

T = TypeVar("T")


def in_pieces(t: Tensor) -> bool:
    """Whether this process has a part of `t` only."""
    return is_sharded(t) or is_cut_up(t)


def any_in_pieces(model: nn.Module, parameters: Callable[[nn.Module], Iterable[Tensor]]) -> bool:
    """Whether this process has a part only of any of these parameters of `model`. What FSDP2 holds whole after a pass without a
    backward pass is cut up again first: what is written into that is lost, and each process would take it for its own."""
    reshard(model)
    return any(map(in_pieces, parameters(model)))


def cut_up_by(model: nn.Module) -> str | None:
    """What spreads the parameters of `model` over several processes, in words; None where each process has them all. FSDP is
    named also while it holds them whole."""
    if any(map(is_cut_up, model.parameters())):
        return "DeepSpeed's ZeRO-3"
    if any(map(by_fsdp2, model.modules())):
        return "FSDP2"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP1"
    return "tensor parallelism" if any(map(is_sharded, model.parameters())) else None


def whole_on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all values on the CPU, in process 0; `{}` in the others where a tensor is sharded.

    Every process must call it with the same names in the same order where one is sharded.
    """
    writes = writes_files(tensors)
    whole = {}
    for key, t in tensors.items():
        with filled(t):
            value = t.detach()
            if is_sharded(value):
                value = value.full_tensor()
            # A copy, because safetensors refuses tensors that share memory, as tied weights do.
            if writes:
                whole[key] = value.to("cpu", copy=True).contiguous()
    return whole


def writes_files(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process is the one that writes: any where nothing is sharded, else process 0."""
    return not any(map(in_pieces, tensors.values())) or dist.get_rank() == 0


def together(act: Callable[[], T]) -> T:
    """The result of `act()`, once it has succeeded in every process; an error in one is raised in all.

    Raises:
        Exception: whatever `act` raised here.
        RuntimeError: it raised in another process.
    """
    problem, result = None, None
    try:
        result = act()
    except Exception as error:
        problem = error
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem and f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for rank, text in enumerate(problems):
        if text is not None:
            raise RuntimeError(f"process {rank} failed: {text}")
    return result


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Write the whole `value` into `target`, or where `target` is sharded, this process's part of it. No communication, but
    under ZeRO-3, where every process must call it."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    with filled(target, written=True):
        target.copy_(value)
