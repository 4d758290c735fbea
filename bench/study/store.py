"""The file of results: a JSON object a line, one line a cell. A line that is there is never written again."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..locking import locked
from .cells import Record, identity


class Store:
    """The records of a folder's ``*.jsonl`` by id; `add` appends to ``cells.jsonl``.

    Raises:
        ValueError: a line that is no record, a record whose settings do not give its id, or an id twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "cells.jsonl"
        self.records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self._read(file)

    def _read(self, file: Path) -> None:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                ours = identity(record["settings"]) == record["id"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number} is not a cell of this study") from None
            if not ours:
                raise ValueError(f"{file}, line {number}: the settings do not give the id {record['id']}")
            if record["id"] in self.records:
                raise ValueError(f"{file}, line {number}: cell {record['id']} is there twice")
            self.records[record["id"]] = record

    def __contains__(self, settings: dict[str, Any]) -> bool:
        return identity(settings) in self.records

    def __getitem__(self, settings: dict[str, Any]) -> Record:
        return self.records[identity(settings)]

    def add(self, record: Record) -> None:
        """Append one line, whole or not at all.

        Raises:
            ValueError: the cell is there already, or a cell that chooses a learning rate has seen the test part.
        """
        if record["id"] in self.records:
            raise ValueError(f"cell {record['id']} has been counted already")
        if "test" in record and record["settings"]["phase"] != "final":
            raise ValueError(f"cell {record['id']} of phase {record['settings']['phase']!r} has seen the test part")
        line = json.dumps(finite(record), sort_keys=True, allow_nan=False) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            start = os.fstat(descriptor).st_size
            data = line.encode()
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, start)
                raise OSError(f"{self.file} could not be written; is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.records[record["id"]] = json.loads(line)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; ValueError where one is in it."""
        with locked(
            self.folder / ".lock", f"another run is writing to {self.folder}: let it end, or name another --results"
        ):
            yield


def finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
