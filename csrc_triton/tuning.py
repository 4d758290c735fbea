"""Plans measured on this machine: a file for each device, versions and kernels in the user's cache directory.

Written when tuning is asked for (`allora bench --tune`), read when the first plan for a device is picked.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from .configs import Config

NEAREST = 2.0
"""A measurement stands for numbers of rows up to this factor from its own."""

_aside = False


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Look nothing up within it: plans are those of a machine on which nothing was measured. Plans that were picked before are
    to be forgotten on both sides of it (`plans.forget`)."""
    global _aside
    before, _aside = _aside, True
    try:
        yield
    finally:
        _aside = before


def directory() -> Path:
    """``$XDG_CACHE_HOME/allora_kernels``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allora_kernels"


@functools.cache
def device_key(device: torch.device) -> str:
    """The device's name, and the versions and kernels that a measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, kernels {_kernels()}"


def _kernels() -> str:
    """A digest of this package's source: a plan that was the fastest of other kernels says nothing of these."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def path(key: str) -> Path:
    """The file of `key`, a `device_key`."""
    return directory() / (re.sub(r"[^a-z0-9.]+", "-", key.lower()).strip("-") + ".json")


def save(key: str, entry: dict[str, Any]) -> None:
    """Add an `entry` to the file of `key`, in place of an older one of the same call."""
    file = path(key)
    known = {_identity(e): e for e in [*_read(file), entry]}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps({"key": key, "entries": list(known.values())}, indent=1))
    partial.replace(file)
    _entries.cache_clear()


def entry(call: tuple, way: str, config: Config | None, milliseconds: dict[str, float], date: str) -> dict[str, Any]:
    """One measured choice as it is saved: the call (a `plans.Call`), the plan that won, every plan's median, the day."""
    *sizes, dtype, low_rank_dtype = call
    return {
        "call": [*sizes, _name(dtype), _name(low_rank_dtype)],
        "way": way,
        "config": None if config is None else dataclasses.asdict(config),
        "milliseconds": milliseconds,
        "date": date,
    }


def lookup(key: str, call: tuple) -> tuple[str, Config | None] | None:
    """(way, config) measured for `call` or for the nearest number of rows; None where nothing near was measured, or what was is
    set aside."""
    if _aside:
        return None
    op, rows, *rest, dtype, low_rank_dtype = call
    same = [e for e in _entries(path(key)) if _identity(e)[2:] == (*rest, _name(dtype), _name(low_rank_dtype))]
    near = {abs(math.log(rows / e["call"][1])): e for e in same if e["call"][0] == op}
    distance = min(near, default=math.inf)
    if distance > math.log(NEAREST):
        return None
    config = near[distance]["config"]
    return near[distance]["way"], None if config is None else Config(**config)


def _identity(entry: dict[str, Any]) -> tuple:
    return tuple(entry["call"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _entries(file: Path) -> list[dict[str, Any]]:
    return _read(file)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text())["entries"]
        for e in entries:
            op, *sizes, _, _ = e["call"]
            if not (
                isinstance(op, str) and all(isinstance(size, int) and size >= 1 for size in sizes) and len(sizes) == 4
            ):
                raise ValueError(f"unknown call {e['call']}")
            if not isinstance(e["way"], str):
                raise ValueError(f"unknown way {e['way']}")
            if e["config"] is not None:
                Config(**e["config"])
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"allora_kernels: {file} cannot be read ({error}); plans are estimated", RuntimeWarning, stacklevel=2
        )
        return []
