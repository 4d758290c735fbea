"""A section that times whole steps: every provider checked first, then all of them side by side, case by case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from allora_kernels.tools.timing import interleaved

from .cases import Case
from .layer import as_row, failure, peak_bytes
from .runner import Run

Step = Callable[[], tuple[Tensor, ...]]
"""One forward and backward pass: its results, nothing of it left behind."""


class StepCase(Protocol):
    """A dataclass that prints as its title; `layer` is what --shapes asks for."""

    @property
    def layer(self) -> Case: ...


class StepSpec(Protocol):
    """How a provider is built for a batch; `obstacle()` says why it cannot run here, None where it can."""

    def build(self, batch: Any) -> Step: ...

    def obstacle(self) -> str | None: ...


class StepJudge(Protocol):
    """Says what is wrong with a provider's step, None if nothing is."""

    def verdict(self, spec: Any, step: Step) -> str | None: ...


def run_steps(
    run: Run,
    section: str,
    grid: Sequence[StepCase],
    providers: Mapping[str, StepSpec],
    floor: str,
    prepare: Callable[[Any, torch.device], tuple[Any, StepJudge]],
) -> None:
    """Time and peak memory of `floor` and of every provider that was asked for; `prepare` makes a case's batch and judge."""
    names = [name for name in providers if run.providers is None or name == floor or name in run.providers]
    grid = [case for case in grid if _asked_for(run, case)]
    for position, case in enumerate(grid):
        if run.time_is_up():
            run.leave(section, [(asdict(rest), names) for rest in grid[position:]])
            return
        if run.only_missing and run.results.has(section, asdict(case), names):
            continue
        chosen = {name: providers[name] for name in names}
        run.record(section, str(case), asdict(case), _rows(run, case, chosen, prepare))
    run.leave(section, [])


def _asked_for(run: Run, case: StepCase) -> bool:
    return not run.shapes or any(wanted.items() <= asdict(case.layer).items() for wanted in run.shapes)


def _rows(run: Run, case: StepCase, providers: Mapping[str, StepSpec], prepare) -> dict[str, dict]:
    """The rows of one case, whatever fails."""
    rows: dict[str, dict] = {}
    steps: dict[str, Step] = {}
    try:
        batch, judge = prepare(case, run.device)
        for name, spec in providers.items():
            rows[name] = _checked(judge, batch, name, spec, steps)
        del judge
        for name, step in steps.items():
            rows[name]["step_peak_bytes"] = peak_bytes(step, run.device)
        # Many providers and few cases: twice the time, for as many rounds.
        budget_s = 2 * run.case_budget_s
        timings = interleaved(steps, rounds=run.rounds, device=run.device, budget_s=budget_s)
        for name, timing in timings.items():
            rows[name]["step"] = as_row(timing)
    except Exception as error:
        rows |= {name: failure(error) for name in (steps or providers)}
    return rows


def _checked(judge: StepJudge, batch: Any, name: str, spec: StepSpec, steps: dict[str, Step]) -> dict[str, str]:
    """The row of a provider before it is timed; its step goes into `steps` if it is right."""
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


def taken(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Their gradients, which the next call is to find empty."""
    grads = tuple(t.grad for t in tensors)
    for t in tensors:
        t.grad = None
    return grads
