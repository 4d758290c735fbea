"""A block of the report for a section of steps: a table for each device, a row for each provider, a column for each case."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import (
    adapter_providers,
    adapters,
    expert_providers,
    experts,
    quantized,
    quantized_providers,
    sample_providers,
    samples,
)
from .markdown import earlier, provenance, table
from .measured import NOT_MEASURED, median, quoted, records
from .steps import StepCase, StepSpec


class Shown(NamedTuple):
    """A section of steps as it stands in the report: `what` names a step, `floor` what the others are compared with."""

    section: str
    what: str
    floor: str
    providers: Mapping[str, StepSpec]
    gpu_cases: Sequence[StepCase]
    case_type: type


SAMPLES = Shown(
    "per-sample", "a clipped step", "plain", sample_providers.PROVIDERS, samples.GPU_CASES, samples.SampleCase
)
EXPERTS = Shown(
    "experts", "forward and backward", "frozen", expert_providers.PROVIDERS, experts.GPU_CASES, experts.ExpertCase
)
ADAPTERS = Shown(
    "adapters", "forward and backward", "frozen", adapter_providers.PROVIDERS, adapters.GPU_CASES, adapters.AdaptersCase
)
QUANTIZED = Shown(
    "quantized",
    "forward and backward",
    "frozen",
    quantized_providers.PROVIDERS,
    quantized.GPU_CASES,
    quantized.QuantizedCase,
)


def block(shown: Shown, devices: list[dict]) -> str:
    """The tables of each device that has the section, and where they come from; of a GPU at least that there is none."""
    measured = [data for data in devices if any(True for _ in records(data, shown.section))]
    parts = [_device(shown, data) for data in measured]
    if not any(_name(data) != "cpu" for data in measured):
        rows = [[f"`{name}`", *([NOT_MEASURED] * len(shown.gpu_cases))] for name in shown.providers]
        heading = f"On a GPU, ms and peak MiB of {shown.what}:"
        parts.insert(0, f"{heading}\n\n{table(['', *map(str, shown.gpu_cases)], rows)}")
    return "\n\n".join(parts)


def _name(data: dict) -> str:
    return data["runs"][-1]["device"]


def _device(shown: Shown, data: dict) -> str:
    of_case: dict[StepCase, list[dict]] = {}
    for record in records(data, shown.section):
        of_case.setdefault(shown.case_type(**record["case"]), []).append(record)
    # As they were added, the oldest first.
    cases = list(reversed(of_case))
    rows = [[f"`{name}`", *(_cell(of_case[case], name, shown.floor) for case in cases)] for name in shown.providers]
    source = provenance(data, shown.section)
    where = "On one core of a CPU" if _name(data) == "cpu" else f"On {_name(data)}"
    heading = (
        f"{where}, ms of {shown.what} (p20 to p80), its ratio to `{shown.floor}`, peak memory where it is counted:"
    )
    return f"{heading}\n\n{table(['', *map(str, cases)], rows)}\n\n{source}"


def _cell(found: list[dict], name: str, over: str) -> str:
    """Of a case's records, the newest first."""
    record = quoted(found, name, over) or next((record for record in found if name in record["providers"]), None)
    if record is None:
        return NOT_MEASURED
    row = record["providers"][name]
    time, floor = median(record, name, "step"), median(record, over, "step")
    if time is None:
        return f"{row['status']}: {row['reason']}" if "reason" in row else row["status"]
    digits = 1 if time >= 10 else 2
    text = f"{time:.{digits}f} ({row['step']['p20_ms']:.{digits}f} to {row['step']['p80_ms']:.{digits}f})"
    text += f" = {time / floor:.2f}x" if floor else ""
    peak = row.get("step_peak_bytes")
    text += "" if peak is None else f", {peak / 2**20:,.0f} MiB"
    return text + earlier(record, found[0])
