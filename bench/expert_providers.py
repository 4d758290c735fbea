"""What the section "experts" compares: forward and backward of grouped linear layers, rows sorted by expert.

A step gives y, dX, dA and dB, the frozen one y and dX. All but this library's run plain LoRA (C = 1), which is less work than
ALLoRA. Each is checked against a loop over the experts in fp64 before it is timed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allora_kernels import grouped_linear
from allora_kernels.groups import reference
from allora_kernels.testing import Inputs

from .grouped import Judge, Spec
from .providers import ETA
from .steps import Step, taken


class Batch(NamedTuple):
    """The inputs with x [M, K] and g [M, N] sorted by expert, weight [E, N, K], lora_A [E, R, K], lora_B [E, N, R]; `ends` [E]
    (int32) is where each expert's rows end."""

    inputs: Inputs
    ends: Tensor


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x W_eᵀ`` of each expert's rows by torch's grouped GEMM."""
    return F.grouped_mm(x, weight.mT, offs=ends)


def _frozen(batch: Batch) -> Step:
    inputs = batch.inputs

    def step():
        y = _product(inputs.x, inputs.weight, batch.ends)
        y.backward(inputs.g)
        return y.detach(), *taken(inputs.x)

    return step


def _factors(batch: Batch) -> tuple[Tensor, Tensor]:
    return tuple(t.clone().requires_grad_() for t in (batch.inputs.lora_A, batch.inputs.lora_B))


def _ours(batch: Batch) -> Step:
    inputs = batch.inputs
    lora_A, lora_B = _factors(batch)

    def step():
        y = grouped_linear(inputs.x, inputs.weight, None, lora_A, lora_B, batch.ends, eta=ETA)
        y.backward(inputs.g)
        return y.detach(), *taken(inputs.x, lora_A, lora_B)

    return step


def _grouped_mm(batch: Batch) -> Step:
    inputs = batch.inputs
    lora_A, lora_B = _factors(batch)

    def step():
        s = _product(inputs.x, lora_A, batch.ends)
        y = _product(inputs.x, inputs.weight, batch.ends) + _product(s, lora_B, batch.ends)
        y.backward(inputs.g)
        return y.detach(), *taken(inputs.x, lora_A, lora_B)

    return step


class _Experts(nn.Module):
    """A stack of experts' weights as transformers keeps them, for PEFT to find."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return _product(x, self.weight, ends)


def _peft(batch: Batch) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    inputs = batch.inputs
    experts, r, k = inputs.lora_A.shape
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=[], target_parameters=["experts.weight"])
    wrapped = inject_adapter_in_model(config, nn.ModuleDict({"experts": _Experts(inputs.weight)}))["experts"]
    # PEFT keeps the experts slowest in lora_A and fastest in lora_B.
    stored = inputs.lora_A.reshape(experts * r, k), inputs.lora_B.permute(1, 2, 0).reshape(-1, r * experts)
    parameters = tuple(nn.Parameter(t.clone()) for t in stored)
    wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight = parameters

    def step():
        y = wrapped(inputs.x, batch.ends)
        y.backward(inputs.g)
        dx, da, db = taken(inputs.x, *parameters)
        return y.detach(), dx, da.view(experts, r, k), db.view(-1, r, experts).permute(2, 0, 1)

    return step


PROVIDERS = {
    "frozen": Spec(
        "the experts without adapters, by torch's grouped GEMM: the floor", _frozen, "frozen", needs="grouped_mm"
    ),
    "ours": Spec("`grouped_linear`, C of every expert computed anew", _ours, "allora", tolerance=2.0),
    "grouped-mm": Spec("LoRA as two more of torch's grouped GEMMs", _grouped_mm, needs="grouped_mm"),
    "peft": Spec(
        "PEFT's LoRA of the parameter (`target_parameters`): W + BA of all experts is made, then torch's grouped GEMM",
        _peft,
        needs="peft",
    ),
}


def judge_of(batch: Batch) -> Judge:
    """Compares providers with a loop over the experts."""
    inputs, ends = batch
    return Judge(
        ("y", "dx", "dA", "dB"),
        lambda formula: tuple(_loop(t, ends, formula) for t in (inputs, inputs.to(torch.float64))),
    )


def _loop(inputs: Inputs, ends: Tensor, formula: str) -> tuple[Tensor, ...]:
    """(y, dX, dA, dB) expert by expert in plain torch; (y, dX) of the frozen ones."""
    x, lora_A, lora_B = (t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    if formula == "frozen":
        zero = torch.zeros_like(lora_B)
        y = reference.grouped_linear(x, inputs.weight, None, lora_A.detach(), zero, ends, norm=None)
        return y, *torch.autograd.grad(y, x, inputs.g)
    norm = "row" if formula == "allora" else None
    y = reference.grouped_linear(x, inputs.weight, None, lora_A, lora_B, ends, eta=ETA, norm=norm)
    return y, *torch.autograd.grad(y, (x, lora_A, lora_B), inputs.g)
