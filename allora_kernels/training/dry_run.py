"""`allora finetune --dry-run`: what a run would do, found by doing all of it that comes before the first step."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from ..layer.bases import nbytes
from ..models.adapted import AdaptReport
from ..models.explained import ModelExplanation, explain
from .config import FinetuneConfig
from .machine import device, processes
from .preparing import prepare
from .run_folder import check_output
from .steps import steps
from .together_preparing import check_together, prepare_together


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
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    parameters = list(prepared.model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    frozen = sum(map(nbytes, (t for t in chain(parameters, prepared.model.buffers()) if not t.requires_grad)))
    moments = {"adamw": 2, "sgd": 1 if config.momentum else 0}[config.optimizer]
    return DryRun(
        report=prepared.report,
        explanation=explain(prepared.model, config.batch_size * max(lengths), device()),
        train_rows=len(prepared.train),
        eval_rows=len(prepared.evaluation),
        tokens=sum(lengths),
        longest=max(lengths),
        rows_of_a_step=config.batch_size * config.grad_accumulation * processes(),
        steps=steps(config, len(prepared.train)),
        weight_bytes=frozen,
        trained_bytes=trained,
        optimizer_bytes=moments * trained,
    )


@dataclass(frozen=True)
class DryRunTogether:
    """`str()` of it is meant to be read."""

    report: AdaptReport
    explanation: ModelExplanation
    runs: dict[str, str]
    """What each run would do, in a line."""
    shared: int
    """Bytes of everything that is not trained."""
    trained: int
    """Bytes of all adapters and heads."""

    def __str__(self) -> str:
        return "\n".join(
            [
                str(self.report),
                str(self.explanation),
                f"{len(self.runs)} runs over one base model, a mixed batch a step:",
                *(f"  {name}: {line}" for name, line in self.runs.items()),
                f"memory, computed: {self.shared / 2**20:,.1f} MiB frozen, {self.trained / 2**20:,.1f} MiB trained; gradients, "
                "optimizers and activations come on top",
                "nothing was written",
            ]
        )


def dry_run_together(configs: Mapping[str, FinetuneConfig]) -> DryRunTogether:
    """What `finetune_together` with these runs would do.

    Raises:
        ValueError, TypeError: what `finetune_together` would raise before its first step.
    """
    check_together(configs)
    for config in configs.values():
        check_output(config, together=True)
    prepared = prepare_together(configs)
    model = next(iter(prepared.values())).model
    lines, rows = {}, 0
    for name, config in configs.items():
        lengths = [len(ids) for ids in prepared[name].train["input_ids"]]
        rows += config.batch_size * max(lengths)
        lines[name] = (
            f"r={config.r}, eta={config.eta:g}, norm={config.norm}, {config.optimizer}, learning rate "
            f"{config.learning_rate:g} (of lora_B {config.learning_rate * config.loraplus_lr_ratio:g}), seed "
            f"{config.seed}; {config.data}: {len(lengths):,} rows to train on "
            f"({sum(lengths):,} tokens), {len(prepared[name].evaluation):,} to evaluate on; "
            f"{config.batch_size * config.grad_accumulation} rows a step, {steps(config, len(lengths)):,} steps; into "
            f"{config.output}"
        )
    parameters = list(model.parameters())
    return DryRunTogether(
        report=next(iter(prepared.values())).report,
        explanation=explain(model, rows, device()),
        runs=lines,
        shared=sum(map(nbytes, (t for t in chain(parameters, model.buffers()) if not t.requires_grad))),
        trained=sum(p.nbytes for p in parameters if p.requires_grad),
    )
