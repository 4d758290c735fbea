"""What one layer is measured on: shapes, ranks and dtypes, the most important first."""

import argparse
import re
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from allora_kernels.testing import Inputs


@dataclass(frozen=True)
class Case:
    """One layer: x [M, K], weight [N, K], rank R; dtypes by torch's names, `adapter_dtype` that of lora_A and lora_B."""

    M: int
    N: int
    K: int
    R: int
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"

    def __str__(self) -> str:
        dtypes = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}/{self.adapter_dtype}"
        return f"M={self.M} {self.K}x{self.N} R={self.R} {dtypes}"

    def inputs(self, device: str | torch.device, seed: int = 0) -> Inputs:
        """Random inputs as `allora_kernels.testing.make_inputs` scales them, drawn on `device`: a large shape takes the
        host seconds."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0, dtype: str = self.dtype) -> Tensor:
            t = torch.empty(*shape, device=device, dtype=getattr(torch, dtype))
            return t.normal_(generator=generator).mul_(scale)

        return Inputs(
            x=draw(self.M, self.K),
            weight=draw(self.N, self.K, scale=self.K**-0.5),
            bias=draw(self.N),
            lora_A=draw(self.R, self.K, scale=self.K**-0.5, dtype=self.adapter_dtype),
            lora_B=draw(self.N, self.R, scale=self.R**-0.5, dtype=self.adapter_dtype),
            g=draw(self.M, self.N),
        )


TARGETS = {
    "M=8192, 4096x4096": Case(8192, 4096, 4096, 16),
    "M=8192, 4096x14336": Case(8192, 14336, 4096, 16),
    "M=2048, 4096x4096": Case(2048, 4096, 4096, 16),
}
"""The cases that the targets are stated for, by their titles (K x N)."""

ONE_RANK_MORE = Case(8192, 4096, 4096, 64)
"""R=64 is to cost at most a tenth more than R=16 here."""

# (K, N) of Llama-3.1-8B, Qwen2.5-7B and Qwen2.5-0.5B.
_LAYERS = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (3584, 18944), (896, 4864)]
_ROWS = [8192, 2048, 512, 16384]
# Adapters' dtype and rank, of which PEFT takes fp32 and 8 where nothing is said.
_USUAL = [("float32", 16), ("bfloat16", 8), ("float32", 8)]


def gpu_grid() -> list[Case]:
    """Every case, those that matter most first."""
    targets = list(TARGETS.values())
    usual = [Case(m, 4096, 4096, r, "bfloat16", adapters) for adapters, r in _USUAL for m in (8192, 2048)]
    first = [*targets, Case(512, 4096, 4096, 16), ONE_RANK_MORE, *usual]
    rank_16 = [Case(m, n, k, 16) for m, (k, n) in product(_ROWS, _LAYERS)]
    other_ranks = [Case(m, 4096, 4096, r) for r, m in product([64, 8, 128], [8192, 2048, 512])]
    other_dtypes = [
        Case(m, 4096, 4096, 16, *dtypes)
        for m, dtypes in product(
            [8192, 2048],
            [("bfloat16", "float32"), ("float16", "float16"), ("float16", "float32"), ("float32", "float32")],
        )
    ]
    the_rest = [Case(m, n, k, r) for r, m, (k, n) in product([64, 8, 128], _ROWS, _LAYERS)]
    return list(dict.fromkeys([*first, *rank_16, *other_ranks, *other_dtypes, *the_rest]))


def cpu_grid() -> list[Case]:
    """A few small shapes in fp32: the ratios of a CPU say nothing of a GPU's."""
    return [Case(m, n, k, 8, "float32", "float32") for m, k, n in [(512, 768, 768), (128, 768, 3072), (2048, 256, 256)]]


def compiles(case: Case) -> bool:
    """Whether torch.compile's provider is worth its minutes of compilation here: at the targets and at the smallest M."""
    return case in (*TARGETS.values(), Case(512, 4096, 4096, 16), cpu_grid()[0])


def parse_shape(text: str) -> dict[str, int]:
    """``"M=8192,K=4096"`` as a filter: the dims that a case must have. Raises argparse.ArgumentTypeError for anything
    else."""
    wanted = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([MNKR])=(\d+)\s*", part)
        if not match:
            raise argparse.ArgumentTypeError(
                f"a shape is a list such as M=8192,N=4096,K=4096,R=16 (any of them), got {text!r}"
            )
        wanted[match[1]] = int(match[2])
    return wanted


def above_zero(text: str) -> float:
    """A number for argparse, which is to be above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"it must be a number above 0, got {text!r}")
    return number


def matching(cases: list[Case], filters: list[dict[str, int]]) -> list[Case]:
    """The cases that fit any of the filters, or all where there is none; a filter that names every dimension and fits
    no case is a bf16 case of its own."""
    if not filters:
        return cases
    found = [case for case in cases if any(wanted.items() <= asdict(case).items() for wanted in filters)]
    own = [Case(**wanted) for wanted in filters if wanted.keys() == set("MNKR")]
    shapes = {(case.M, case.N, case.K, case.R) for case in found}
    return found + [case for case in own if (case.M, case.N, case.K, case.R) not in shapes]
