"""`allora finetune --dry-run`: what a run would do, found by doing all of it that comes before the first step."""

import math
import os
from dataclasses import dataclass
from itertools import chain

import torch

from ..models.adapted import AdaptReport
from ..models.explained import ModelExplanation, explain
from .config import FinetuneConfig
from .preparing import prepare
from .run import check_output


@dataclass(frozen=True)
class DryRun:
    """`str()` of it is meant to be read. Sizes in bytes, computed: activations are not among them."""

    report: AdaptReport
    explanation: ModelExplanation
    train_rows: int
    eval_rows: int
    tokens: int
    """Of the training data, padding not counted."""
    longest: int
    """Tokens of its longest row."""
    rows_of_a_step: int
    steps: int
    weight_bytes: int
    """Of everything that is not trained, buffers too."""
    trained_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        # A gradient is as large as its parameter.
        parts = {
            "frozen": self.weight_bytes,
            "trained": self.trained_bytes,
            "gradients": self.trained_bytes,
            "optimizer": self.optimizer_bytes,
        }
        sizes = ", ".join(f"{size / 2**20:,.1f} MiB {name}" for name, size in parts.items())
        return "\n".join(
            [
                str(self.report),
                str(self.explanation),
                f"data: {self.train_rows:,} rows to train on ({self.tokens:,} tokens, {self.longest} at most in one), "
                f"{self.eval_rows:,} to evaluate on",
                f"batches: {self.rows_of_a_step} rows a step, {self.steps:,} steps",
                f"memory, computed: {sizes}; activations come on top",
                "nothing was written",
            ]
        )


def dry_run(config: FinetuneConfig) -> DryRun:
    """What `finetune` with these settings would do.

    Raises:
        ValueError, TypeError: what `finetune` would raise before its first step.
    """
    check_output(config)
    prepared = prepare(config)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    parameters = list(prepared.model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    frozen = sum(t.nbytes for t in chain(parameters, prepared.model.buffers()) if not t.requires_grad)
    moments = {"adamw": 2, "sgd": 1 if config.momentum else 0}[config.optimizer]
    return DryRun(
        report=prepared.report,
        explanation=explain(prepared.model, config.batch_size * max(lengths), device),
        train_rows=len(prepared.train),
        eval_rows=len(prepared.evaluation),
        tokens=sum(lengths),
        longest=max(lengths),
        rows_of_a_step=config.batch_size * config.grad_accumulation * _processes(),
        steps=steps(config, len(prepared.train)),
        weight_bytes=frozen,
        trained_bytes=trained,
        optimizer_bytes=moments * trained,
    )


def steps(config: FinetuneConfig, rows: int) -> int:
    """Optimizer steps of a run on `rows` rows, as transformers' Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * _processes()))
    return math.ceil(config.epochs * math.ceil(batches / config.grad_accumulation))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
