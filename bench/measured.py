"""Ratios out of files of results. Two providers are compared within one record only: one case of one run."""

from collections.abc import Iterator
from dataclasses import asdict

from .cases import Case
from .steps import StepCase


def records(data: dict, section: str) -> Iterator[dict]:
    """The records of a section, the newest first."""
    return (record for record in reversed(data["records"]) if record["section"] == section)


def median(record: dict, provider: str, kind: str) -> float | None:
    """A provider's median in ms; None where it was not measured, or its result was wrong."""
    row = record["providers"].get(provider, {})
    return row[kind]["median_ms"] if row.get("status") == "ok" and kind in row else None


def ratio(
    data: dict, case: Case | StepCase, provider: str, kind: str, over: str = "frozen", section: str = "layer"
) -> float | None:
    """Median of `provider` over that of `over`, from the newest record of `case` that has both."""
    for record in records(data, section):
        if record["case"] == asdict(case):
            times = median(record, provider, kind), median(record, over, kind)
            if None not in times:
                return times[0] / times[1]
    return None
