"""Tensors that several processes hold a part of each (FSDP2, tensor parallelism, ZeRO-3): gathered to save, cut up to load."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer.sharding import is_sharded
from ..layer.zero import filled, is_cut_up

T = TypeVar("T")


def in_pieces(t: Tensor) -> bool:
    """Whether this process has a part of `t` only."""
    return is_sharded(t) or is_cut_up(t)


def cut_up_by(model: nn.Module) -> str | None:
    """What spreads the parameters of `model` over several processes, in words; None where each process has them all. Also where
    FSDP holds them whole for now."""
    if any(map(is_cut_up, model.parameters())):
        return "DeepSpeed's ZeRO-3"
    # Asking for the classes would import FSDP for all.
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FSDPModule" in kinds or "FullyShardedDataParallel" in kinds:
        return "FSDP2" if "FSDPModule" in kinds else "FSDP1"
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
