"""The section "quantized": forward and backward of one frozen layer in 4 bits with an adapter, as in QLoRA."""

from dataclasses import dataclass

import torch

from .cases import Case
from .grouped import Judge
from .quantized_providers import PROVIDERS, Batch, judge_of, quantize
from .runner import Run
from .steps import run_steps


@dataclass(frozen=True)
class QuantizedCase:
    """x [M, K] and a weight [N, K] that bitsandbytes stores as nf4 with double quantization, rank R; dtypes by torch's names:
    `dtype` is what the layer computes in, `adapter_dtype` that of lora_A and lora_B."""

    M: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"

    def __str__(self) -> str:
        return f"nf4, {self.layer}"

    @property
    def layer(self) -> Case:
        """The layer before it was quantized."""
        return Case(self.M, self.N, self.K, self.R, self.dtype, self.adapter_dtype)

    def batch(self, device: torch.device) -> Batch:
        """Random inputs, drawn on `device`, and the quantized layer."""
        inputs = self.layer.inputs(device)
        return Batch(inputs._replace(x=inputs.x.requires_grad_()), quantize(inputs))


# The targets' shapes with fp32 adapters, which is PEFT's and this library's default; then adapters of x's dtype.
GPU_CASES = [
    QuantizedCase(8192, 4096, 4096, 16),
    QuantizedCase(8192, 14336, 4096, 16),
    QuantizedCase(2048, 4096, 4096, 16),
    QuantizedCase(8192, 4096, 4096, 16, adapter_dtype="bfloat16"),
]
CPU_CASES = [QuantizedCase(512, 768, 768, 8, "float32")]


def run_quantized(run: Run) -> None:
    """Time and peak memory of every provider, case by case."""
    run_steps(run, "quantized", GPU_CASES if run.on_gpu else CPU_CASES, PROVIDERS, "frozen", _prepare)


def _prepare(case: QuantizedCase, device: torch.device) -> tuple[Batch, Judge]:
    batch = case.batch(device)
    return batch, judge_of(batch)
