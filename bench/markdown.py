"""What the pages of the report are made of."""


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(headings: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    return "\n".join([_row(*headings), _row(*["---"] * len(headings)), *(_row(*cells) for cells in rows)])


def provenance(data: dict) -> str:
    """Where the numbers come from, each run that a record is left of."""
    lines = []
    for run in data["runs"]:
        changed = ", with uncommitted changes" if run.get("changed_files") else ""
        versions = ", ".join(
            f"{name} {run.get(name)}" for name in ("driver", "torch", "triton", "transformers", "peft", "opacus")
        )
        lines.append(f"{run['device']}, {versions}, commit {str(run.get('commit'))[:10]}{changed}, {run['date']}.")
    return "\n".join(dict.fromkeys(lines))
