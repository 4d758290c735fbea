"""Adapters of which each process holds a part, by FSDP2: it gathers them around each pass, and frees what it gathered."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..layer.sharding import is_sharded


def gradients(adapters: Iterable[nn.Module]) -> dict[nn.Parameter, tuple[Tensor | None, int]]:
    """The gradient of each factor of `adapters` that is sharded and trained, and how often it was written."""
    factors = (p for adapter in adapters for p in (adapter.lora_A, adapter.lora_B))
    found = {p: p.grad for p in factors if is_sharded(p) and p.requires_grad}
    return {p: (grad, 0 if grad is None else grad.to_local()._version) for p, grad in found.items()}


def check_reduced(before: Mapping[nn.Parameter, tuple[Tensor | None, int]], adapters: Iterable[nn.Module]) -> None:
    """That `gradients` of all these `adapters` are no longer what they were `before`.

    Raises:
        RuntimeError: FSDP2 keeps them back. It would add them, not clipped, to what a later pass brings.
    """
    for p, (grad, writes) in gradients(adapters).items():
        former, former_writes = before[p]
        if grad is former and writes == former_writes:
            raise RuntimeError(
                "FSDP2 has not averaged the recorded gradients over the processes: call model.set_requires_gradient_sync(True) "
                "before the last backward pass of a record"
            )


def averaged(grad: Tensor, p: nn.Parameter) -> Tensor:
    """This process's part of the mean over processes of `grad`, which is whole, as p is cut."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = p.device_mesh
    parts = DTensor.from_local(grad.to(p.dtype) / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return parts.redistribute(placements=p.placements)
