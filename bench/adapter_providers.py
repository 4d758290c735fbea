"""What the section "adapters" compares: forward and backward of one frozen layer, each sample with the adapter that it names.

A step gives y, dX, then dA of every adapter, then dB; the frozen one y and dX. All but this library's run plain LoRA (C = 1),
which is less work than ALLoRA. Each is checked against a loop over the adapters in fp64 before it is timed.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import Adapter, multi_adapter_linear
from allora_kernels.groups import reference
from allora_kernels.testing import Inputs

from .grouped import Judge, Spec
from .providers import ETA, frozen_linear, own_layer
from .steps import Step, taken


class Batch(NamedTuple):
    """x [b, T, K], g [b, T, N], the frozen weight [N, K] and bias [N], the adapters' lora_A [R, K] and lora_B [N, R], and the
    number of each sample's adapter."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    g: Tensor
    of_sample: tuple[int, ...]

    def rows(self) -> Tensor:
        """The number of each row's adapter [b, T] (int32)."""
        of_sample = torch.tensor(self.of_sample, device=self.x.device, dtype=torch.int32)
        return of_sample[:, None].expand(self.x.shape[:2]).contiguous()

    def layer(self) -> nn.Linear:
        """The frozen layer."""
        return frozen_linear(Inputs(self.x, self.weight, self.bias, self.lora_A[0], self.lora_B[0], self.g))


def _frozen(batch: Batch) -> Step:
    def step():
        y = F.linear(batch.x, batch.weight, batch.bias)
        y.backward(batch.g)
        return y.detach(), *taken(batch.x)

    return step


def _factors(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([t.detach().clone().requires_grad_() for t in factors] for factors in (batch.lora_A, batch.lora_B))


def _ours(batch: Batch) -> Step:
    lora_A, lora_B = _factors(batch)
    adapters = [Adapter(a, b, eta=ETA) for a, b in zip(lora_A, lora_B)]
    row_adapter = batch.rows()

    def step():
        y = multi_adapter_linear(batch.x, batch.weight, batch.bias, adapters, row_adapter)
        y.backward(batch.g)
        return y.detach(), *taken(batch.x, *lora_A, *lora_B)

    return step


def _one_by_one(batch: Batch) -> Step:
    layers, samples = [], []
    for e, (a, b) in enumerate(zip(batch.lora_A, batch.lora_B)):
        layers.append(own_layer(Inputs(batch.x, batch.weight, batch.bias, a, b, batch.g)))
        samples.append([i for i, own in enumerate(batch.of_sample) if own == e])
    # Each run would have a batch of its own: that they are cut out of one here is not timed.
    parts = [(batch.x.detach()[own].requires_grad_(), batch.g[own]) for own in samples]

    def step():
        results = []
        for layer, (x, g) in zip(layers, parts):
            y = layer(x)
            y.backward(g)
            results.append((y.detach(), *taken(x, layer.lora_A, layer.lora_B)))
        return results

    return step


def _joined(batch: Batch, results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """(y, dX, dA of each, dB of each) out of the (y, dX, dA, dB) of each adapter's own batch."""
    order = torch.tensor(batch.of_sample).argsort(stable=True).argsort()
    y, dx, da, db = zip(*results)
    return torch.cat(y)[order], torch.cat(dx)[order], *da, *db


def _grouped_mm(batch: Batch) -> Step:
    lora_A, lora_B = _factors(batch)
    count, (rows, K) = len(lora_A), (batch.x.shape[:2].numel(), batch.x.shape[2])
    row_adapter = batch.rows().view(-1)
    order = row_adapter.argsort(stable=True)
    back = order.argsort()
    ends = torch.bincount(row_adapter, minlength=count).cumsum(0).to(torch.int32)

    def step():
        s = F.grouped_mm(batch.x.view(rows, K)[order], torch.stack(lora_A).mT, offs=ends)
        low_rank = F.grouped_mm(s, torch.stack(lora_B).mT, offs=ends)[back]
        y = F.linear(batch.x, batch.weight, batch.bias) + low_rank.view_as(batch.g)
        y.backward(batch.g)
        return y.detach(), *taken(batch.x, *lora_A, *lora_B)

    return step


def _peft(batch: Batch) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    r = batch.lora_A[0].shape[0]
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=["linear"])
    model = nn.ModuleDict({"linear": batch.layer()})
    names = [f"adapter_{e}" for e in range(len(batch.lora_A))]
    for name in names:
        model = inject_adapter_in_model(config, model, adapter_name=name)
    layer = model["linear"]
    parameters = []
    for module, values in ((layer.lora_A, batch.lora_A), (layer.lora_B, batch.lora_B)):
        for name, value in zip(names, values):
            module[name].weight = nn.Parameter(value.clone())
            parameters.append(module[name].weight)
    of_sample = [names[e] for e in batch.of_sample]

    def step():
        y = layer(batch.x, adapter_names=of_sample)
        y.backward(batch.g)
        return y.detach(), *taken(batch.x, *parameters)

    return step


PROVIDERS = {
    "frozen": Spec("the same nn.Linear without an adapter, by the vendor's GEMM: the floor", _frozen, "frozen"),
    "ours": Spec("`multi_adapter_linear`, C of every adapter computed anew", _ours, "allora", tolerance=2.0),
    "one-by-one": Spec(
        "`FusedALLoRALinear`, a batch for each adapter, one after the other", _one_by_one, "allora", 2.0, apart=True
    ),
    "grouped-mm": Spec("LoRA: rows gathered by adapter, two of torch's grouped GEMMs", _grouped_mm, needs="grouped_mm"),
    "peft": Spec("PEFT's LoRA layer with `adapter_names`", _peft, needs="peft"),
}


def judge_of(batch: Batch) -> Judge:
    """Compares providers with a loop over the adapters."""
    of_each = [f"{factor} of adapter {e}" for factor in ("dA", "dB") for e in range(len(batch.lora_A))]
    dtypes = (batch.weight.dtype, torch.float64)
    return Judge(
        ["y", "dx", *of_each],
        lambda formula: tuple(_loop(batch, dtype, formula) for dtype in dtypes),
        functools.partial(_joined, batch),
    )


def _loop(batch: Batch, dtype: torch.dtype, formula: str) -> tuple[Tensor, ...]:
    """(y, dX, dA of each, dB of each) adapter by adapter in plain torch; (y, dX) of the frozen layer."""
    x = batch.x.detach().to(dtype).requires_grad_()
    weight, bias, g = (t.to(dtype) for t in (batch.weight, batch.bias, batch.g))
    if formula == "frozen":
        y = F.linear(x, weight, bias)
        return y, *torch.autograd.grad(y, x, g)
    norm = "row" if formula == "allora" else None
    lora_A, lora_B = (
        [t.detach().to(dtype).requires_grad_() for t in factors] for factors in (batch.lora_A, batch.lora_B)
    )
    adapters = [Adapter(a, b, ETA, norm) for a, b in zip(lora_A, lora_B)]
    rows = x.view(-1, x.shape[-1])
    y = reference.multi_adapter_linear(rows, weight, bias, adapters, batch.rows().view(-1)).view_as(g)
    return y, *torch.autograd.grad(y, (x, *lora_A, *lora_B), g)
