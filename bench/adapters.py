"""The section "adapters": a training step of one frozen layer under several adapters, each sample of the batch with its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_providers import PROVIDERS, Batch, judge_of
from .cases import Case
from .grouped import Judge
from .runner import Run
from .steps import run_steps


@dataclass(frozen=True)
class AdaptersCase:
    """`adapters` adapters of rank R on one layer [N, K], and `b` samples of `T` tokens that take them in turn. `dtype` has
    torch's name."""

    adapters: int
    b: int
    T: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return (
            f"{self.adapters} adapters, {self.b} samples x {self.T} tokens, {self.K}x{self.N} R={self.R} {self.dtype}"
        )

    @property
    def layer(self) -> Case:
        """The layer with all rows."""
        return Case(self.b * self.T, self.N, self.K, self.R, self.dtype, self.dtype)

    def batch(self, device: torch.device) -> Batch:
        """Random inputs, drawn on `device`."""
        flat = self.layer.inputs(device)
        generator = torch.Generator(device).manual_seed(1)

        def draw(like: Tensor, scale: float) -> tuple[Tensor, ...]:
            return tuple(torch.empty_like(like).normal_(generator=generator).mul_(scale) for _ in range(self.adapters))

        return Batch(
            x=flat.x.view(self.b, self.T, self.K).requires_grad_(),
            weight=flat.weight,
            bias=flat.bias,
            lora_A=draw(flat.lora_A, self.K**-0.5),
            lora_B=draw(flat.lora_B, self.R**-0.5),
            g=flat.g.view(self.b, self.T, self.N),
            of_sample=tuple(i % self.adapters for i in range(self.b)),
        )


GPU_CASES = [AdaptersCase(count, b, 8192 // b, 4096, 4096, 16) for count, b in ((4, 16), (16, 16), (64, 64))]
CPU_CASES = [AdaptersCase(4, 8, 64, 768, 768, 16, "float32")]


def run_adapters(run: Run) -> None:
    """Time and peak memory of every provider, case by case."""
    run_steps(run, "adapters", GPU_CASES if run.on_gpu else CPU_CASES, PROVIDERS, "frozen", _prepare)


def _prepare(case: AdaptersCase, device: torch.device) -> tuple[Batch, Judge]:
    batch = case.batch(device)
    return batch, judge_of(batch)
