"""How many optimizer steps a run takes."""

import math
import os

from .config import FinetuneConfig


def steps(config: FinetuneConfig, rows: int) -> int:
    """Optimizer steps of a run on `rows` rows, as transformers' Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * processes()))
    return math.ceil(config.epochs * math.ceil(batches / config.grad_accumulation))


def processes() -> int:
    """Those that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))
