"""The section "per-sample": a training step whose per-sample gradients are clipped, and what it costs over a plain one."""

from dataclasses import dataclass

import torch

from allora_kernels.testing import Inputs

from .cases import Case
from .runner import Run
from .sample_providers import PROVIDERS, Batch, Judge, typical_norm
from .steps import run_steps


@dataclass(frozen=True)
class SampleCase:
    """`b` samples of `T` tokens through one layer [N, K] of rank R; dtypes by torch's names."""

    b: int
    T: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"

    def __str__(self) -> str:
        dtypes = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}/{self.adapter_dtype}"
        return f"{self.b} samples x {self.T} tokens, {self.K}x{self.N} R={self.R} {dtypes}"

    @property
    def layer(self) -> Case:
        """The layer without its cut into samples."""
        return Case(self.b * self.T, self.N, self.K, self.R, self.dtype, self.adapter_dtype)

    def inputs(self, device: torch.device) -> Inputs:
        """Random inputs with x [b, T, K] and g [b, T, N]; x asks for its gradient, as inside a model."""
        flat = self.layer.inputs(device)
        x, g = (t.view(self.b, self.T, t.shape[1]) for t in (flat.x, flat.g))
        return flat._replace(x=x.requires_grad_(), g=g)


GPU_CASES = [SampleCase(b, T, 4096, 4096, 16) for b, T in ((8, 2048), (64, 256), (512, 32))]
CPU_CASES = [SampleCase(b, T, 768, 768, 16, "float32", "float32") for b, T in ((8, 64), (32, 16), (128, 4))]


def run_samples(run: Run) -> None:
    """Time and peak memory of every provider, case by case."""
    run_steps(run, "per-sample", GPU_CASES if run.on_gpu else CPU_CASES, PROVIDERS, "plain", _prepare)


def _prepare(case: SampleCase, device: torch.device) -> tuple[Batch, Judge]:
    inputs = case.inputs(device)
    batch = Batch(inputs, typical_norm(inputs))
    return batch, Judge(batch)
