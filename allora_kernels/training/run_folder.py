"""The folder of a run: whether a run can begin or go on in it, where things lie, and what metrics.json says."""

import copy
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..layer import backend as _backend
from .config import FinetuneConfig
from .machine import device, processes
from .preparing import Prepared
from .progress import peak_memory
from .versions import versions

METRICS_FILE, PLOT_FILE, ADAPTER_FOLDER = "metrics.json", "loss.png", "adapter"
BASE_CONFIG_FILE = "base_config.json"
"""The base model's config beside its adapter: as config.json it would make transformers take the folder for a whole model."""
_CHECKPOINT = "checkpoint-"
_SAME_RUN = ("data", "parameters", "processes")
"""What of metrics.json tells one run from another."""


def check_output(config: FinetuneConfig, together: bool = False) -> dict[str, Any] | None:
    """The metrics of the run to resume, one that is trained `together` with others or by itself; None for a new run. ValueError
    where neither can be."""
    output = Path(config.output).expanduser()
    standing = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not standing.is_dir():
        raise ValueError(f"output must be a folder that can be written, but {standing} is a file")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise ValueError(f"output must be a folder that can be written, but {standing} is read-only")
    if (adapter := output / ADAPTER_FOLDER).exists() and not adapter.is_dir():
        raise ValueError(
            f"output must be a folder for a run, but {adapter} is a file: remove it, or name another --output"
        )
    file = output / METRICS_FILE
    if not config.resume:
        if file.exists() or any(output.glob(f"{_CHECKPOINT}*")):
            raise ValueError(f"{output} has an earlier run: continue it with --resume, or name another --output")
        return None
    if not file.exists():
        raise ValueError(f"there is nothing to resume in {output}: it has no {METRICS_FILE}")
    try:
        former = json.loads(file.read_text(encoding="utf-8"))
        if lacking := {"status", "before", *_SAME_RUN} - former.keys():
            raise KeyError(*lacking)
        changed = config.changed_since(former["config"])
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} is not the {METRICS_FILE} of a run, so it cannot be resumed") from None
    if changed:
        settings = "; ".join(f"{name} was {former['config'].get(name)!r}" for name in changed)
        raise ValueError(f"cannot resume {output} with other settings: {settings}")
    if ("beside" in former) != together:
        how = "together with others, by --adapters" if not together else "by itself, without --adapters"
        raise ValueError(f"the run in {output} was trained {how}: resume it in that way")
    return former


def check_resumed(former: dict[str, Any], metrics: dict[str, Any], config: FinetuneConfig) -> None:
    """ValueError unless the run that begins with `metrics` is the `former` one."""
    if changed := [key for key in _SAME_RUN if former[key] != metrics[key]]:
        raise ValueError(f"cannot resume: {changed} in {config.output}/{METRICS_FILE} are not those of this run")


def first_metrics(config: FinetuneConfig, prepared: Prepared) -> dict[str, Any]:
    """What metrics.json holds when training begins."""
    return {
        "status": "running",
        "config": config.as_json(),
        "versions": versions(),
        "device": _described_device(prepared.dtype),
        "processes": processes(),
        "data": prepared.described(),
        "parameters": {"trainable": prepared.report.trainable, "total": prepared.report.total},
        "before": None,
        "after": None,
    }


def last_metrics(
    status: str, steps: int, tokens: int, tokens_before: int, seconds: float, loss_history: list[list[float]]
) -> dict[str, Any]:
    """What metrics.json holds besides when training has ended. `tokens_before`: of those, how many before it was resumed."""
    return {
        "status": status,
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": (tokens - tokens_before) / max(seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "loss_history": loss_history,
    }


def _described_device(dtype: torch.dtype) -> dict[str, str | bool]:
    here = device()
    choice = _backend.choose(here, dtype)
    name = torch.cuda.get_device_name() if here.type == "cuda" else platform.processor() or platform.machine()
    return {"type": here.type, "name": name, "dtype": str(dtype), "backend": choice.name, "reason": choice.reason}


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after this step is, as transformers' Trainer calls it."""
    return output / f"{_CHECKPOINT}{step}"


def checkpoints(output: Path) -> dict[int, Path]:
    """The folders of all checkpoints, by step, in order."""
    names = {p.name.removeprefix(_CHECKPOINT): p for p in output.glob(f"{_CHECKPOINT}*")}
    return dict(sorted((int(step), folder) for step, folder in names.items() if step.isdecimal()))


def save_beside_adapter(folder: Path, prepared: Prepared) -> None:
    """Write into the adapter's folder what else its use needs: the tokenizer, and the model's config, as PEFT's format has no
    place for the names of the classes."""
    config = copy.deepcopy(prepared.model.config)
    config.architectures = [type(prepared.model).__name__]
    config.to_json_file(folder / BASE_CONFIG_FILE)
    prepared.tokenizer.save_pretrained(folder)


def make_folder(path: str) -> Path:
    """The folder `path`; ValueError where it cannot be made."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output must be a folder that can be written: {folder}: {error.strerror}") from None
    return folder


def write_json(values: dict[str, Any], file: Path) -> None:
    """Write a whole file in one rename."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, file)
