"""What this library promises of its speed (on an H100 where nothing else is said), and whether a file of results keeps it."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from . import experts
from .cases import ONE_RANK_MORE, TARGETS, Case, gpu_grid
from .experts import ExpertCase
from .measured import FAULTS, NOT_MEASURED, deciding, plain_models, records, status
from .passes import Sizes
from .samples import CPU_CASES, GPU_CASES, SampleCase
from .steps import StepCase

FAULT = math.nan
"""The number of a provider of this library that was wrong or failed: it keeps no limit."""


class Worst(NamedTuple):
    """The worst value of the `seen` cases that were measured, `of` how many; FAULT where one of them is."""

    value: float
    seen: int
    of: int


@dataclass(frozen=True)
class Target:
    """`measure(data)` gives the number, None where the results do not have it; `limits` in the order they are to be
    reached, each an upper bound if `at_most`, else a lower one. `on_cpu`: it is a CPU's results that are asked."""

    title: str
    measure: Callable[[dict], float | Worst | None]
    limits: tuple[float, ...]
    at_most: bool = True
    unit: str = "x"
    on_cpu: bool = False

    def cells(self, data: dict | None) -> tuple[str, str]:
        """What was measured, and for each limit whether that keeps it: of a part of the cases that keep it, "so far"."""
        found = None if data is None else self.measure(data)
        if found is None:
            return NOT_MEASURED, ""
        value, seen, of = found if isinstance(found, Worst) else (found, 1, 1)
        if math.isnan(value):
            return "wrong or failed", ", then ".join("**no**" for _ in self.limits)
        kept = [value <= limit if self.at_most else value >= limit for limit in self.limits]
        measured = f"{value:.3g}{self.unit}"
        if seen < of:
            bound = "" if all(kept) else "at least " if self.at_most else "at most "
            measured = f"{bound}{measured} in {seen} of {of} cases"
        return measured, ", then ".join(("yes" if seen == of else "so far") if keeps else "**no**" for keeps in kept)


def _worst(values: Iterable[float | None], pick: Callable) -> Worst | None:
    """The worst of the values that there are."""
    values = list(values)
    there = [value for value in values if value is not None]
    worst = FAULT if any(map(math.isnan, there)) else pick(there, default=None)
    return None if worst is None else Worst(worst, len(there), len(values))


def _both(values: Sequence[float | None], combine: Callable) -> float | None:
    if any(value is not None and math.isnan(value) for value in values):
        return FAULT
    return None if None in values else combine(values)


def _own(provider: str) -> bool:
    return provider.startswith("ours") or provider == "plain"


def _number(found: Iterable[dict], providers: Sequence[str], of_rows: Callable[..., float | None]) -> float | None:
    """`of_rows` of the providers' rows in the record that they are quoted from; FAULT where one of this library's has one."""
    record = deciding(found, *providers)
    if record is None:
        return None
    fares = {name: status(record, name) for name in providers}
    if any(fares[name] in FAULTS and _own(name) for name in providers):
        return FAULT
    return of_rows(*(record["providers"][name] for name in providers)) if set(fares.values()) == {"ok"} else None


def _ratio(
    data: dict, case: Case | StepCase, provider: str, kind: str, over: str = "frozen", section: str = "layer"
) -> float | None:
    def of_rows(*rows: dict) -> float | None:
        return rows[0][kind]["median_ms"] / rows[1][kind]["median_ms"] if all(kind in row for row in rows) else None

    return _number(records(data, section, case), (provider, over), of_rows)


def _over(other: str) -> Callable[[dict], Worst | None]:
    """The least advantage over `other` at the three target shapes, forward + backward."""
    return lambda data: _worst(
        (_ratio(data, case, other, "forward_backward", over="ours") for case in TARGETS.values()), min
    )


def _never_slower_than_peft(data: dict) -> Worst | None:
    def of_case(case: Case) -> float | None:
        ratios = [_ratio(data, case, "ours", kind, over="peft") for kind in ("forward", "forward_backward")]
        return _both(ratios, max)

    return _worst(map(of_case, gpu_grid()), max)


def _dispatch(data: dict) -> float | None:
    def of_rows(ours: dict, frozen: dict) -> float:
        return 1e3 * (ours["forward"]["median_ms"] - frozen["forward"]["median_ms"])

    return _number(records(data, "dispatch"), ("ours", "frozen"), of_rows)


def _rank(data: dict) -> float | None:
    sixteen = Case(**{**asdict(ONE_RANK_MORE), "R": 16})
    ratios = [_ratio(data, case, "ours", "forward_backward") for case in (ONE_RANK_MORE, sixteen)]
    return _both(ratios, lambda pair: pair[0] / pair[1])


def _model(ours: str, other: str, what: str) -> Callable[[dict], float | None]:
    def of_rows(*rows: dict) -> float | None:
        return rows[0][what] / rows[1][what] if all(row.get(what) for row in rows) else None

    return lambda data: _number(plain_models(data, ours, other), (ours, other), of_rows)


def _steps(section: str, provider: str, over: str, cases: Sequence[StepCase], pick: Callable) -> Callable:
    """The worst ratio of two steps over all `cases`."""
    return lambda data: _worst((_ratio(data, case, provider, "step", over, section) for case in cases), pick)


_samples = functools.partial(_steps, "per-sample")


def _experts_memory(data: dict) -> Worst | None:
    """The worst ratio of the memory of our step to the frozen one's, the experts' weights included."""

    def of_case(case: ExpertCase) -> float | None:
        weights = Sizes(case.layer, weights=case.E).w

        def of_rows(*rows: dict) -> float | None:
            ours, frozen = (row.get("step_peak_bytes") for row in rows)
            return (weights + ours) / (weights + frozen) if ours and frozen else None

        return _number(records(data, "experts", case), ("ours", "frozen"), of_rows)

    return _worst(map(of_case, experts.GPU_CASES), max)


def _extra_memory(other: str) -> Callable[[dict], Worst | None]:
    """The worst ratio of what clipping takes over the plain step's memory: ours over the other's."""

    def of_rows(*rows: dict) -> float | None:
        plain, ours, others = (row.get("step_peak_bytes") for row in rows)
        return (ours - plain) / (others - plain) if plain and ours and others and others > plain else None

    def of_case(data: dict, case: SampleCase) -> float | None:
        return _number(records(data, "per-sample", case), ("plain", "ours", other), of_rows)

    return lambda data: _worst((of_case(data, case) for case in GPU_CASES), max)


def _layer(kind: str, title: str, *limits: float) -> Target:
    words = {"forward": "forward", "forward_backward": "forward + backward"}[kind]
    return Target(f"{words} over `frozen`, {title}", lambda data: _ratio(data, TARGETS[title], "ours", kind), limits)


ALL = [
    _layer("forward", "M=8192, 4096x4096", 1.07),
    _layer("forward", "M=8192, 4096x14336", 1.05),
    _layer("forward", "M=2048, 4096x4096", 1.12),
    _layer("forward_backward", "M=8192, 4096x4096", 1.10, 1.05),
    _layer("forward_backward", "M=8192, 4096x14336", 1.08, 1.04),
    _layer("forward_backward", "M=2048, 4096x4096", 1.18),
    Target("faster than `peft` at the worst of these three shapes", _over("peft"), (1.35,), at_most=False),
    Target("faster than `eager` there", _over("eager"), (2.0,), at_most=False),
    Target("faster than `compile` there", _over("compile"), (1.2,), at_most=False),
    Target("faster than `addmm-in-place` there", _over("addmm-in-place"), (1.1,), at_most=False),
    Target("faster than `epilogue-atomics` there", _over("epilogue-atomics"), (1.1,), at_most=False),
    Target("time over `peft` at the worst shape of the grid", _never_slower_than_peft, (1.0,)),
    Target("R=64 over R=16, M=8192, 4096x4096, both over `frozen`", _rank, (1.10,)),
    Target("dispatch of a forward call over `nn.Linear`'s", _dispatch, (30.0,), unit=" µs"),
    Target(
        "model: tokens/s over PEFT LoRA, 16-bit adapters",
        _model("ours", "peft", "tokens_per_s"),
        (1.25,),
        at_most=False,
    ),
    Target(
        "model: tokens/s over PEFT LoRA, fp32 adapters",
        _model("ours-fp32", "peft-fp32", "tokens_per_s"),
        (1.5,),
        at_most=False,
    ),
    Target("model: peak memory over PEFT LoRA, 16-bit adapters", _model("ours", "peft", "peak_bytes"), (1.0,)),
    Target("model: peak memory over PEFT LoRA, fp32 adapters", _model("ours-fp32", "peft-fp32", "peak_bytes"), (0.85,)),
    Target("clipped step over our plain step, worst b x T", _samples("ours", "plain", GPU_CASES, max), (1.15,)),
    *(
        Target(
            f"clipped step faster than `{other}`, worst b x T", _samples(other, "ours", GPU_CASES, min), (limit,), False
        )
        for other, limit in (("opacus-hooks", 5.0), ("opacus-ghost", 2.0))
    ),
    *(
        Target(f"memory over our plain step's, over that of `{other}`, worst b x T", _extra_memory(other), (0.5,))
        for other in ("opacus-hooks", "opacus-ghost")
    ),
    Target(
        f"{experts.GPU_CASES[0]}: faster than `peft`",
        _steps("experts", "peft", "ours", experts.GPU_CASES[:1], min),
        (2.0,),
        at_most=False,
    ),
    Target("experts: memory with the weights over `frozen`, worst case", _experts_memory, (1.05,)),
    *(
        Target(
            f"on a CPU: clipped step faster than `{other}`, worst b x T",
            _samples(other, "ours", CPU_CASES, min),
            (1.0,),
            at_most=False,
            on_cpu=True,
        )
        for other in ("opacus-hooks", "opacus-ghost")
    ),
]


def table(data: dict | None, cpu: dict | None = None) -> str:
    """The targets as a Markdown table, by the results of a GPU and of a CPU; of None, not yet measured."""
    lines = ["| target | limit | measured | met |", "| --- | --- | --- | --- |"]
    for target in ALL:
        measured, met = target.cells(cpu if target.on_cpu else data)
        sign = "≤" if target.at_most else "≥"
        limits = ", then ".join(f"{sign} {limit:g}{target.unit}" for limit in target.limits)
        lines.append(f"| {target.title} | {limits} | {measured} | {met} |")
    return "\n".join(lines)
