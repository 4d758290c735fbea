"""What a run runs on: its processes and its device."""

import os

import torch


def processes() -> int:
    """Those that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", 0))


def device() -> torch.device:
    """Where training runs: an accelerator, where there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
