"""How many optimizer steps a run takes."""

import math

from .config import FinetuneConfig
from .machine import processes


def steps(config: FinetuneConfig, rows: int) -> int:
    """Optimizer steps of a run on `rows` rows, as transformers' Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * processes()))
    return math.ceil(config.epochs * math.ceil(batches / config.grad_accumulation))
