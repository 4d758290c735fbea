"""The sections "layer", "dispatch" and "launches": one layer, each provider checked, then all of them side by side."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from allora_kernels.tools.timing import Timing, dispatch, interleaved

from . import cases
from .cases import Case
from .providers import PROVIDERS, Judge, Provider, forward_backward
from .runner import Run

PASSES = ("forward", "forward_backward")

Ready = dict[str, tuple[Provider, Tensor, Tensor]]
"""The providers that may be timed, each with x and the upstream gradient."""


def run_layer(run: Run) -> None:
    """Device time and peak memory of forward and forward + backward over the grid."""
    grid = cases.gpu_grid() if run.on_gpu else cases.cpu_grid()
    _over_cases(run, "layer", cases.matching(grid, run.shapes), _measure_layer)


def run_dispatch(run: Run) -> None:
    """The host's time until a call returns, with the device idle."""
    own = Case(512, 4096, 4096, 16) if run.on_gpu else Case(4, 64, 64, 4, "float32", "float32")
    _over_cases(run, "dispatch", [own], _measure_dispatch)


def run_launches(run: Run) -> None:
    """How many kernels a call runs, on a GPU. After everything that is timed: CUPTI, once loaded, slows launches."""
    if run.on_gpu:
        _over_cases(run, "launches", [cases.TARGETS["M=8192, 4096x4096"], Case(512, 4096, 4096, 16)], _count)


def _over_cases(run: Run, section: str, grid: list[Case], measure: Callable) -> None:
    for position, case in enumerate(grid):
        if run.time_is_up():
            run.leave(section, [(asdict(rest), run.providers_for(rest)) for rest in grid[position:]])
            return
        names = run.providers_for(case)
        if run.only_missing and run.results.has(section, asdict(case), names):
            continue
        rows = _checked_and_measured(run, case, names, measure)
        run.record(section, str(case), asdict(case), rows)
    run.leave(section, [])


def _checked_and_measured(run: Run, case: Case, names: list[str], measure: Callable) -> dict[str, dict]:
    """The rows of one case, whatever fails."""
    rows: dict[str, dict] = {}
    ready: Ready = {}
    try:
        rows, ready = _prepare(run, case, names)
        if ready:
            x, g = next(iter(ready.values()))[1:]
            for name, values in measure(run, ready, x, g).items():
                rows[name] |= values
    except Exception as error:
        fault = failure(error)
        rows |= {name: fault for name in (ready or names)}
    return rows


def _prepare(run: Run, case: Case, names: list[str]) -> tuple[dict[str, dict], Ready]:
    """A row for each provider, and those that are right and may be timed, with x and g."""
    rows: dict[str, dict] = {}
    ready: Ready = {}
    judge = Judge()
    inputs = case.inputs(run.device)
    x = inputs.x.requires_grad_()
    for name in names:
        spec = PROVIDERS[name]
        obstacle = spec.obstacle(inputs)
        if obstacle is not None:
            rows[name] = {"status": "unavailable", "reason": obstacle}
            continue
        try:
            own = spec.inputs(inputs)
            provider = spec.build(own)
            fault = judge.verdict(spec, provider, own)
        except Exception as error:
            rows[name] = failure(error)
            continue
        rows[name] = {"status": "ok"} if fault is None else {"status": "wrong", "reason": fault}
        if provider.plan is not None:
            rows[name]["plan"] = provider.plan
        if fault is None:
            ready[name] = (provider, x, inputs.g)
    return rows, ready


def failure(error: Exception) -> dict[str, str]:
    """The row of a provider that could not run."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return {"status": "failed", "reason": "out of memory"}
    text = str(error).strip().splitlines()
    return {"status": "failed", "reason": f"{type(error).__name__}: {text[0][:200] if text else ''}"}


def _calls(ready: Ready, x: Tensor, g: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    forward = {name: lambda p=provider: p.forward(x) for name, (provider, *_) in ready.items()}
    both = {name: lambda p=provider: forward_backward(p, x, g) for name, (provider, *_) in ready.items()}
    return {"forward": forward, "forward_backward": both}


def as_row(timing: Timing) -> dict:
    """A Timing as it stands in the file."""
    return asdict(timing)


def _measure_layer(run: Run, ready: Ready, x: Tensor, g: Tensor) -> dict[str, dict]:
    rows: dict[str, dict] = {name: {} for name in ready}
    for kind, calls in _calls(ready, x, g).items():
        for name, call in calls.items():
            rows[name][f"{kind}_peak_bytes"] = peak_bytes(call, run.device)
        timings = interleaved(calls, rounds=run.rounds, device=run.device, budget_s=run.case_budget_s)
        for name, timing in timings.items():
            rows[name][kind] = as_row(timing)
    return rows


def _measure_dispatch(run: Run, ready: Ready, x: Tensor, g: Tensor) -> dict[str, dict]:
    rows: dict[str, dict] = {name: {} for name in ready}
    for kind, calls in _calls(ready, x, g).items():
        for name, timing in dispatch(calls, rounds=200, device=run.device, budget_s=run.case_budget_s).items():
            rows[name][kind] = as_row(timing)
    return rows


def _count(run: Run, ready: Ready, x: Tensor, g: Tensor) -> dict[str, dict]:
    calls = _calls(ready, x, g)
    return {
        name: {f"{kind}_launches": count_launches(calls[kind][name], run.device) for kind in PASSES} for name in ready
    }


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call holds at once, over what was allocated before; None on a CPU, where torch counts none."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def count_launches(call: Callable[[], object], device: torch.device) -> int:
    """How many kernels a call runs on a GPU, as CUPTI (roctracer) tells torch.profiler; copies and fills, which are
    launches too, included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
