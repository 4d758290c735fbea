"""The section "experts": a training step of the experts of a mixture, each a frozen weight with an adapter of its own."""

from dataclasses import dataclass

import torch

from allora_kernels.testing import Inputs

from .cases import Case
from .expert_providers import PROVIDERS, Batch, judge_of
from .grouped import Judge
from .runner import Run
from .steps import run_steps


@dataclass(frozen=True)
class ExpertCase:
    """M rows, sorted by expert, through E experts [N, K] of rank R each; dtypes by torch's names."""

    E: int
    M: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.E} experts {self.K}x{self.N}, {self.M} rows, R={self.R} {self.dtype}"

    @property
    def layer(self) -> Case:
        """One expert with all rows."""
        return Case(self.M, self.N, self.K, self.R, self.dtype, self.dtype)

    def batch(self, device: torch.device) -> Batch:
        """Random inputs, drawn on `device`; the rows of each expert are as many as a router that draws at random gives it."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            t = torch.empty(*shape, device=device, dtype=getattr(torch, self.dtype))
            return t.normal_(generator=generator).mul_(scale)

        inputs = Inputs(
            x=draw(self.M, self.K).requires_grad_(),
            weight=draw(self.E, self.N, self.K, scale=self.K**-0.5),
            bias=None,
            lora_A=draw(self.E, self.R, self.K, scale=self.K**-0.5),
            lora_B=draw(self.E, self.N, self.R, scale=self.R**-0.5),
            g=draw(self.M, self.N),
        )
        expert = torch.randint(self.E, (self.M,), generator=torch.Generator().manual_seed(0))
        ends = torch.bincount(expert, minlength=self.E).cumsum(0)
        return Batch(inputs, ends.to(device, torch.int32))


# The first is the one that PEFT's authors published; then the same with eight experts a token, and Mixtral's up-projection.
GPU_CASES = [
    ExpertCase(128, 4096, 768, 2048, 16),
    ExpertCase(128, 32768, 768, 2048, 16),
    ExpertCase(8, 16384, 14336, 4096, 16),
]
CPU_CASES = [ExpertCase(16, 512, 256, 512, 16, "float32")]


def run_experts(run: Run) -> None:
    """Time and peak memory of every provider, case by case."""
    run_steps(run, "experts", GPU_CASES if run.on_gpu else CPU_CASES, PROVIDERS, "frozen", _prepare)


def _prepare(case: ExpertCase, device: torch.device) -> tuple[Batch, Judge]:
    batch = case.batch(device)
    return batch, judge_of(batch)
