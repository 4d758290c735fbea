"""Numbers out of files of results. Two providers are compared within one record only: one case of one run.

What is quoted of some providers is of the newest record that has all of them. Where a newer one has any of them as wrong or
failed, nothing is quoted: no older number stands for what is no longer right.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from .cases import Case
from .steps import StepCase

FAULTS = ("wrong", "failed")
NOT_MEASURED = "not yet measured"


def records(data: dict, section: str, case: Case | StepCase | None = None) -> Iterator[dict]:
    """The records of a section, the newest first: all, or those of one case."""
    wanted = None if case is None else asdict(case)
    return (
        record
        for record in reversed(data["records"])
        if record["section"] == section and wanted in (None, record["case"])
    )


def status(record: dict, provider: str) -> str | None:
    """How a provider fared; None where the record does not name it."""
    return record["providers"].get(provider, {}).get("status")


def median(record: dict, provider: str, kind: str) -> float | None:
    """A provider's median in ms; None where it was not measured, or its result was wrong."""
    row = record["providers"].get(provider, {})
    return row[kind]["median_ms"] if row.get("status") == "ok" and kind in row else None


def deciding(found: Iterable[dict], *providers: str) -> dict | None:
    """Of records, the newest first: the first that has all `providers` right, or any of them as wrong or failed."""
    for record in found:
        found_so = [status(record, name) for name in providers]
        if any(each in FAULTS for each in found_so) or all(each == "ok" for each in found_so):
            return record
    return None


def quoted(found: Iterable[dict], *providers: str) -> dict | None:
    """The record that numbers of `providers` are quoted from; None where there is none, or one of them has a fault."""
    record = deciding(found, *providers)
    return record if record and all(status(record, name) == "ok" for name in providers) else None


def absence(found: Iterable[dict], provider: str) -> str:
    """Why a provider has no number: its status in the newest record that names it, or that none does."""
    return next((named for record in found if (named := status(record, provider))), NOT_MEASURED)


def plain_models(data: dict, *variants: str) -> Iterator[dict]:
    """The records of whole models without checkpointing or compilation, the newest first, of those sizes that hold all of
    `variants`: what does not fit is run again with half the layers."""
    for record in records(data, "model"):
        case, rows = record["case"], [record["providers"].get(name, {}) for name in variants]
        if not (case["checkpointing"] or case["compiled"]) and all(r.get("reason") != "out of memory" for r in rows):
            yield record


def ratio(
    data: dict, case: Case | StepCase, provider: str, kind: str, over: str = "frozen", section: str = "layer"
) -> float | None:
    """Median of `provider` over that of `over`, from the record of `case` that they are quoted from."""
    record = quoted(records(data, section, case), provider, over)
    times = [median(record, name, kind) for name in (provider, over)] if record else [None]
    return None if None in times else times[0] / times[1]
