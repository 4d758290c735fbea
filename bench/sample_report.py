"""The block "per-sample" of the report: what clipping costs over a plain step, a column for each device and b x T."""

from .markdown import provenance, table
from .measured import median, records
from .sample_providers import PROVIDERS
from .samples import GPU_CASES, SampleCase

NO_GPU = "not yet measured"


def block(devices: list[dict]) -> str:
    """The tables of each device that has the section, and where they come from; of a GPU at least that there is none."""
    measured = [data for data in devices if any(True for _ in records(data, "per-sample"))]
    parts = [_device(data) for data in measured]
    if not any(_name(data) != "cpu" for data in measured):
        rows = [[f"`{name}`", *([NO_GPU] * len(GPU_CASES))] for name in PROVIDERS]
        parts.insert(0, f"On a GPU, ms and peak MiB of a clipped step:\n\n{table(['', *map(str, GPU_CASES)], rows)}")
    return "\n\n".join(parts)


def _name(data: dict) -> str:
    return data["runs"][-1]["device"]


def _device(data: dict) -> str:
    newest: dict[SampleCase, dict] = {}
    for record in records(data, "per-sample"):
        newest.setdefault(SampleCase(**record["case"]), record)
    cases = sorted(newest, key=lambda case: case.b)
    rows = [[f"`{name}`", *(_cell(newest[case], name) for case in cases)] for name in PROVIDERS]
    used = {record["run"] for record in newest.values()}
    source = provenance({"runs": [run for i, run in enumerate(data["runs"]) if i in used]})
    where = "On one core of a CPU" if _name(data) == "cpu" else f"On {_name(data)}"
    heading = f"{where}, ms of a clipped step (p20 to p80), its ratio to `plain`, peak memory where it is counted:"
    return f"{heading}\n\n{table(['', *map(str, cases)], rows)}\n\n{source}"


def _cell(record: dict, name: str) -> str:
    row = record["providers"].get(name, {"status": "not run"})
    time, floor = median(record, name, "step"), median(record, "plain", "step")
    if time is None:
        return f"{row['status']}: {row['reason']}" if "reason" in row else row["status"]
    text = f"{time:.1f} ({row['step']['p20_ms']:.1f} to {row['step']['p80_ms']:.1f})"
    text += f" = {time / floor:.2f}x" if floor else ""
    peak = row.get("step_peak_bytes")
    return text if peak is None else f"{text}, {peak / 2**20:,.0f} MiB"
