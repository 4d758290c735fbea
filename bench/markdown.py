"""What the pages of the report are made of."""

from .results import VERSIONS


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(headings: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    return "\n".join([_row(*headings), _row(*["---"] * len(headings)), *(_row(*cells) for cells in rows)])


def earlier(record: dict, newest: dict) -> str:
    """What marks a number beside those of the `newest` record of its case, if it is of an earlier one."""
    return "" if record is newest else " (an earlier run)"


def provenance(data: dict, *sections: str) -> str:
    """Where the numbers come from, each run that a record is left of, of these `sections` (none: of all); runs that differ by
    their time alone in one line."""
    used = {r["run"] for r in data["records"] if not sections or r["section"] in sections}
    dates: dict[str, list[str]] = {}
    for number, run in enumerate(data["runs"]):
        if number not in used:
            continue
        changed = {True: ", with uncommitted changes", None: ", uncommitted changes not known"}.get(
            run.get("changed_files"), ""
        )
        versions = ", ".join(f"{name} {run.get(name)}" for name in ("driver", *VERSIONS))
        source = f"{run['device']}, {versions}, commit {str(run.get('commit'))[:10]}{changed}"
        dates.setdefault(source, []).append(run["date"])
    return "\n".join(
        f"{source}, {min(found)}{f' to {max(found)}' if max(found) > min(found) else ''}."
        for source, found in dates.items()
    )
