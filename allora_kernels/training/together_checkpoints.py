"""Checkpoints of runs that are trained together: each run's own, as it goes on without those of the others."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_file
from .run_folder import checkpoint_folder, checkpoints

STATE_FILE = "run_state.pt"
KEPT = 2


def write_state(output: Path, step: int, state: dict[str, Any]) -> Path:
    """Write all of a checkpoint but the adapter, whose files make it whole; the checkpoint's folder."""
    folder = checkpoint_folder(output, step)
    folder.mkdir(exist_ok=True)
    aside = folder / f".{STATE_FILE}"
    torch.save(state, aside)
    os.replace(aside, folder / STATE_FILE)
    return folder


def whole_checkpoints(output: Path) -> dict[int, Path]:
    """The folders of the whole checkpoints, by step."""
    return {step: folder for step, folder in checkpoints(output).items() if _is_whole(folder)}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` wrote into this folder."""
    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def drop_old_ones(output: Path) -> None:
    """Remove what is older than the last two whole checkpoints."""
    kept = [*whole_checkpoints(output)][-KEPT:]
    for step, folder in checkpoints(output).items():
        if kept and step < kept[0]:
            shutil.rmtree(folder)


def drop_later_ones(output: Path, step: int) -> None:
    """Remove the checkpoints after this step."""
    for later, folder in checkpoints(output).items():
        if later > step:
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
