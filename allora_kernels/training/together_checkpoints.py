"""Checkpoints of runs that are trained together: each run's own, as it goes on without those of the others."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_file

STATE_FILE = "run_state.pt"
_KEPT = 2


def write_state(output: Path, step: int, state: dict[str, Any]) -> Path:
    """Write all of a checkpoint but the adapter, whose files make it whole; the checkpoint's folder."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    aside = folder / f".{STATE_FILE}"
    torch.save(state, aside)
    os.replace(aside, folder / STATE_FILE)
    return folder


def last_checkpoint(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last whole checkpoint, and its state; None where there is none."""
    found = [folder for folder in _checkpoints(output) if _is_whole(folder)]
    return (found[-1], torch.load(found[-1] / STATE_FILE, map_location="cpu", weights_only=True)) if found else None


def drop_old_ones(output: Path) -> None:
    """Remove what is older than the last two whole checkpoints."""
    folders = _checkpoints(output)
    whole = [folder for folder in folders if _is_whole(folder)][-_KEPT:]
    for folder in folders[: folders.index(whole[0])] if whole else ():
        shutil.rmtree(folder)


def random_state() -> dict[str, torch.Tensor]:
    """The state of the random numbers that training draws."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """`random_state` undone."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _is_whole(folder: Path) -> bool:
    files = (folder / STATE_FILE, adapter_file(folder, CONFIG_FILE), adapter_file(folder, WEIGHTS_FILE))
    return all(file.exists() for file in files)


def _checkpoints(output: Path) -> list[Path]:
    """Their folders, by step."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in output.glob("checkpoint-*")}
    return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))
