"""A call on DTensors: each process runs the kernels on its shards, and only small tensors cross between processes.

How the weight is placed along a dimension of the mesh says how the layer is cut along it:

    weight      cut over    x           bias      lora_A     lora_B     y           sums over processes
    Shard(0)    N           whole       Shard(0)  whole      Shard(0)   Shard(-1)   dX, dA
    Shard(1)    K           Shard(-1)   added once  Shard(1) whole      Partial     y, S
    Replicate   x's rows    as it is    whole     whole      whole      as x is     dA, dB

`torch.distributed.tensor.parallel`'s ColwiseParallel is the first row and RowwiseParallel the second. Tensors that are
placed otherwise are redistributed first. C's norms cross as Gram matrices [R, R], or for "factor" as R numbers. S
[M, R] crosses in the backward pass, where dB or C needs all of it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import reference
from . import backend as _backend

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(t: Tensor | None) -> bool:
    """Whether `t` is a DTensor."""
    return t is not None and type(t) not in _PLAIN and hasattr(t, "device_mesh")


def by_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` cut up parameters of `module`."""
    # Asking for the class would import FSDP2 for all.
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Put the parts back in the place of parameters that FSDP2 still holds whole after a pass. No communication."""
    for module in filter(by_fsdp2, model.modules()):
        module.reshard()


def local_shape(t: Tensor) -> torch.Size:
    """The shape of the part of `t` that this process has."""
    return t.to_local().shape if is_sharded(t) else t.shape


class Sharding:
    """How one call of the layer is cut; made from the call's tensors, of which at least one is a DTensor.

    Raises:
        ValueError: the others are no DTensors or have another mesh; the weight is placed in a way that is not in the
            table above; a process would hold no part of the weight.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
        named = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
        named = {name: t for name, t in named.items() if t is not None}
        plain = [name for name, t in named.items() if not is_sharded(t)]
        if plain:
            others = ", ".join(name for name in named if name not in plain)
            raise ValueError(
                f"{', '.join(plain)} must be a DTensor as {others} are: parallelize_module with ColwiseParallel or "
                "RowwiseParallel makes all of them"
            )
        self.mesh: DeviceMesh = weight.device_mesh
        for name, t in named.items():
            if t.device_mesh != self.mesh:
                raise ValueError(f"{name} is on {t.device_mesh} but weight is on {self.mesh}; use one mesh")
        self.over_n = self._cut(weight, 0)
        self.over_k = self._cut(weight, 1)
        for i, p in enumerate(weight.placements):
            if not (p.is_replicate() or i in self.over_n or i in self.over_k):
                raise ValueError(f"weight must be placed by Shard(0), Shard(1) or Replicate(), got {p}")
        self._y_shape = (*x.shape[:-1], weight.shape[0])
        self._rows_of = [p if p.is_shard() and p.dim != x.dim() - 1 else None for p in x.placements]

    def _cut(self, weight: "DTensor", dim: int) -> list[int]:
        """The dimensions of the mesh over which dimension `dim` of the weight is cut."""
        dims = [i for i, p in enumerate(weight.placements) if p.is_shard(dim)]
        smallest = weight.shape[dim]
        for i in dims:
            count = self.mesh.size(i)
            # As torch.chunk cuts: all parts are of one size, but the last ones may be smaller, or empty.
            smallest -= (count - 1) * -(-smallest // count)
        if smallest < 1:
            raise ValueError(
                f"weight {list(weight.shape)} cannot be cut along dimension {dim} over {self.mesh}: a process would get "
                "no part of it"
            )
        return dims

    def _along_mesh(self, n: "Placement", k: "Placement", rows: "list[Placement]") -> "list[Placement]":
        dims = range(self.mesh.ndim)
        return [n if i in self.over_n else k if i in self.over_k else rows[i] for i in dims]

    def local(
        self, x: "DTensor", weight: "DTensor", bias: "DTensor | None", lora_A: "DTensor", lora_B: "DTensor"
    ) -> Iterator[Tensor | None]:
        """This process's part of each tensor; the gradients find their way back through what is whole or cut there."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        whole, total = Replicate(), Partial()
        every = [whole] * self.mesh.ndim
        x_rows = [p or whole for p in self._rows_of]
        # Where the rows of x are cut, each process has a part of the sum over them.
        row_sums = [total if p else whole for p in self._rows_of]
        last = Shard(x.dim() - 1)
        cut_bias = self._along_mesh(Shard(0), whole, every)
        x_placements = tuple(self._along_mesh(whole, last, x_rows))
        if x.placements != x_placements:
            x = x.redistribute(placements=x_placements)
        # dX is left as parts of a sum, which several layers on one x add up before it crosses.
        yield x.to_local(grad_placements=self._along_mesh(total, last, x_rows))
        yield weight.to_local()
        # In every process, because a bias that is cut otherwise is gathered from all.
        bias = None if bias is None else _part(bias, cut_bias, cut_bias)
        yield bias if self._adds_bias() else None
        yield _part(lora_A, self._along_mesh(whole, Shard(1), every), self._along_mesh(total, Shard(1), row_sums))
        yield _part(lora_B, self._along_mesh(Shard(0), whole, every), self._along_mesh(Shard(0), whole, row_sums))

    def _adds_bias(self) -> bool:
        """Of the processes whose results are added up, the first adds the bias."""
        return all(self.mesh.get_local_rank(i) == 0 for i in self.over_k)

    def whole(self, y: Tensor) -> "DTensor":
        """The DTensor of which `y` is this process's part."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        rows = [p or Replicate() for p in self._rows_of]
        placements = self._along_mesh(Shard(len(self._y_shape) - 1), Partial(), rows)
        shape = torch.Size(self._y_shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def steps(self, backend: str) -> "ShardedSteps":
        """The layer's steps on the shards, by `backend`."""
        groups = [[self.mesh.get_group(i) for i in dims] for dims in (self.over_n, self.over_k)]
        return ShardedSteps(backend, *groups)


def _part(t: "DTensor", placements: "list[Placement]", grad_placements: "list[Placement]") -> Tensor:
    return t.redistribute(placements=placements).to_local(grad_placements=grad_placements)


class ShardedSteps:
    """The steps of one backend, where N or K is cut over the processes of some groups: `reference`'s functions by name.

    Every process of a group must call them in the same order.
    """

    def __init__(self, backend: str, over_n: list, over_k: list) -> None:
        self._steps = _backend.steps(backend)
        self.adapted_linear = self._steps.adapted_linear
        self.down_project, self.fused_linear = self._steps.down_project, self._steps.fused_linear
        self._over_n, self._over_k = over_n, over_k

    def weight_coefficient(self, lora_A: Tensor, lora_B: Tensor, eta: float, norm: str) -> Tensor:
        """As `reference.weight_coefficient` of the whole factors; of lora_B's rows those that are here."""
        if not (self._over_k or (self._over_n and norm == "matrix")):
            return self._steps.weight_coefficient(lora_A, lora_B, eta, norm)
        if norm == "factor":
            norms_a, norms_b = reference.factor_norms(lora_A, lora_B)
            return reference.coefficient(torch.cat([norms_b, _sum(norms_a.square(), self._over_k).sqrt()]), eta)
        gram_a = _sum(reference.gram(lora_A), self._over_k)
        if norm == "row":
            return reference.coefficient(reference.quadratic_norms(lora_B, gram_a), eta)
        gram_b = _sum(reference.gram(lora_B.mT), self._over_n)
        return reference.coefficient((gram_a * gram_b).sum().clamp_min(0).sqrt().reshape(1), eta)

    def adapter_grads(self, g, x, s, lora_B, c, eta, norm, need_ds, dtype_a, dtype_b):
        """As `reference.adapter_grads`, for the shards and an S that over K is a part of the sum."""
        if dtype_b is not None or norm in ("entry", "token"):
            s = _sum(s, self._over_k)
        if norm == "token" and self._over_n:
            gram_b = _sum(reference.gram(lora_B.mT), self._over_n)
            c = reference.coefficient(reference.quadratic_norms(s, gram_b), eta)
        return self._steps.adapter_grads(g, x, s, lora_B, c, eta, norm, need_ds, dtype_a, dtype_b)


def _sum(t: Tensor, groups: list) -> Tensor:
    """The sum of the processes' `t`, which is left as it is."""
    if groups:
        t = t.clone(memory_format=torch.contiguous_format)
    for group in groups:
        torch.distributed.all_reduce(t, group=group)
    return t
