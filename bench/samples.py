"""The section "per-sample": a training step whose per-sample gradients are clipped, and what it costs over a plain one."""

from dataclasses import asdict, dataclass

import torch

from allora_kernels.testing import Inputs
from allora_kernels.tools.timing import interleaved

from .cases import Case
from .layer import as_row, failure, peak_bytes
from .runner import Run
from .sample_providers import PROVIDERS, Batch, Judge, Step, typical_norm


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
    names = [name for name in PROVIDERS if run.providers is None or name == "plain" or name in run.providers]
    grid = [case for case in (GPU_CASES if run.on_gpu else CPU_CASES) if _asked_for(run, case)]
    for position, case in enumerate(grid):
        if run.time_is_up():
            run.leave("per-sample", [(asdict(rest), names) for rest in grid[position:]])
            return
        if run.only_missing and run.results.has("per-sample", asdict(case), names):
            continue
        run.record("per-sample", str(case), asdict(case), _rows(run, case, names))
    run.leave("per-sample", [])


def _asked_for(run: Run, case: SampleCase) -> bool:
    return not run.shapes or any(wanted.items() <= asdict(case.layer).items() for wanted in run.shapes)


def _rows(run: Run, case: SampleCase, names: list[str]) -> dict[str, dict]:
    """The rows of one case, whatever fails."""
    rows: dict[str, dict] = {}
    steps: dict[str, Step] = {}
    try:
        inputs = case.inputs(run.device)
        batch = Batch(inputs, typical_norm(inputs))
        judge = Judge(batch)
        for name in names:
            rows[name] = _checked(judge, batch, name, steps)
        del judge
        for name, step in steps.items():
            rows[name]["step_peak_bytes"] = peak_bytes(step, run.device)
        # Many providers and few cases: twice the time, for as many rounds.
        budget_s = 2 * run.case_budget_s
        timings = interleaved(steps, rounds=run.rounds, device=run.device, budget_s=budget_s)
        for name, timing in timings.items():
            rows[name]["step"] = as_row(timing)
    except Exception as error:
        rows |= {name: failure(error) for name in (steps or names)}
    return rows


def _checked(judge: Judge, batch: Batch, name: str, steps: dict[str, Step]) -> dict[str, str]:
    """The row of a provider before it is timed; its step goes into `steps` if it is right."""
    spec = PROVIDERS[name]
    obstacle = spec.obstacle()
    if obstacle is not None:
        return {"status": "unavailable", "reason": obstacle}
    try:
        step = spec.build(batch)
        fault = judge.verdict(spec, step)
    except Exception as error:
        return failure(error)
    if fault is not None:
        return {"status": "wrong", "reason": fault}
    steps[name] = step
    return {"status": "ok"}
