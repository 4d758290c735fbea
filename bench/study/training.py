"""The one loop that every method goes through: transformers' Trainer with the arguments, losses and measures of `finetune`."""

import math
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .methods import Method, build, make_optimizer
from .tasks import Task, label_names, load_tokenizer, training_parts, word_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

EVALUATION_BATCH = {"classification": 50, "prompt": 10, "causal-lm": 10}
"""Rows at a time where nothing is trained, by kind of task: no part of a result, but a decoder's logits are large."""
LOOP = {"schedule": "linear", "warmup_fraction": 0.05, "max_grad_norm": 0.0}
"""Of every run. The norm of the whole gradient would tie an adapter's step to the head's, so it is not clipped."""
MEASURES = ("loss_mean", "accuracy", "macro_f1", "perplexity")


def make_trainer(
    task: Task,
    method: Method,
    optimizer: str,
    steps: int,
    samples: int | None,
    rate: float,
    seed: int,
    output: str,
    callbacks: Iterable = (),
    model=None,
) -> "Trainer":
    """A Trainer on `samples` random rows of the task (None: all). What is random depends on the seed alone."""
    import transformers

    from allora_kernels.training import FinetuneConfig, run
    from allora_kernels.training.progress import StopOnNonFinite

    model = build(task, method, seed) if model is None else model
    config = FinetuneConfig(
        model=task.model,
        data=task.name,
        output=output,
        batch_size=task.batch_size,
        max_steps=steps,
        schedule=LOOP["schedule"],
        warmup_steps=max(1, round(LOOP["warmup_fraction"] * steps)),
        max_grad_norm=LOOP["max_grad_norm"],
        seed=seed,
    )
    tokenizer = load_tokenizer(task.model)
    trainer = transformers.Trainer(
        model=model,
        args=run.training_arguments(
            config, save_strategy="no", label_names=["labels"], per_device_eval_batch_size=EVALUATION_BATCH[task.kind]
        ),
        train_dataset=training_rows(task, samples, seed),
        data_collator=_collator(task, tokenizer),
        processing_class=tokenizer,
        optimizers=(make_optimizer(model, method, optimizer, rate) if trains(model) else None, None),
        callbacks=[StopOnNonFinite(), *callbacks],
        **_hooks(task, run),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@contextmanager
def scratch_folder(within: str | None = None) -> Iterator[str]:
    """A folder for what Trainer insists on writing."""
    with tempfile.TemporaryDirectory(dir=within) as folder:
        yield folder


def versions() -> dict[str, Any]:
    """What a number must say of where it comes from."""
    from importlib import metadata

    import torch

    packages = ("torch", "transformers", "peft", "datasets", "scikit-learn", "allora-kernels")
    found = {name: metadata.version(name) for name in packages}
    device = "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    return {"python": platform.python_version(), **found, "device": device, "threads": torch.get_num_threads()}


def trains(model) -> bool:
    """Whether any parameter is left to train."""
    return any(p.requires_grad for p in model.parameters())


def training_rows(task: Task, samples: int | None, seed: int) -> "Dataset":
    """`samples` rows to train on, or all: others for another seed, the same for every method.

    Raises:
        ValueError: the task has fewer.
    """
    rows, _ = training_parts(task)
    if samples is None:
        return rows
    if samples > len(rows):
        raise ValueError(f"{task.name} has {len(rows)} rows to train on, {samples} were asked for")
    return rows.shuffle(seed=seed).select(range(samples))


def train(trainer: "Trainer") -> dict[str, Any]:
    """Train; how it went: ``seconds``, ``loss`` (mean of the first and of the last ten steps, at most), ``diverged``."""
    import transformers

    started, diverged = time.monotonic(), False
    transformers.set_seed(trainer.args.seed)
    if trains(trainer.model):
        try:
            trainer.train()
        except FloatingPointError:
            diverged = True
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ends = [losses[:10], losses[-10:]] if losses and not diverged else []
    return {
        "seconds": round(time.monotonic() - started, 2),
        "loss": [sum(end) / len(end) for end in ends],
        "diverged": diverged,
    }


def measure(trainer: "Trainer", rows: "Dataset") -> dict[str, float]:
    """``loss_mean`` and ``accuracy`` (and ``macro_f1``), or ``perplexity``, of the model on `rows`."""
    found = trainer.evaluate(eval_dataset=rows)
    return {name: found[f"eval_{name}"] for name in MEASURES if f"eval_{name}" in found}


def _collator(task: Task, tokenizer):
    import transformers

    if task.kind == "classification":
        return transformers.DataCollatorWithPadding(tokenizer)
    if task.kind == "prompt":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.default_data_collator


def _hooks(task: Task, run) -> dict[str, Any]:
    """`finetune`'s own loss and logits; scikit-learn's measures of them."""
    from sklearn.metrics import accuracy_score, f1_score

    def classified(prediction) -> dict[str, float]:
        (losses, chosen), labels = prediction.predictions, prediction.label_ids
        if task.kind == "prompt":
            labels = labels.max(axis=1)
        return {
            "loss_mean": float(losses.mean()),
            "accuracy": float(accuracy_score(labels, chosen)),
            "macro_f1": float(f1_score(labels, chosen, average="macro", zero_division=0.0)),
        }

    def modelled(prediction) -> dict[str, float]:
        loss = float(prediction.predictions[0].mean())
        return {"loss_mean": loss, "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan}

    hooks = run.classification_hooks(task.kind == "classification")
    if task.kind == "causal-lm":
        return hooks | {"compute_metrics": modelled}
    if task.kind == "classification":
        return hooks | {"compute_metrics": classified}
    return {"preprocess_logits_for_metrics": _next_words(task), "compute_metrics": classified}


def _next_words(task: Task):
    """Of a prompt: the loss of the labelled word, and the likelier of the words that stand for labels."""
    import torch
    from torch import nn

    words = torch.tensor([word_id(task, label) for label in label_names(task)])

    def judged(logits, labels):
        logits = (logits[0] if isinstance(logits, tuple) else logits).float()
        rows, places = (labels != -100).nonzero(as_tuple=True)
        before = logits[rows, places - 1]
        losses = nn.functional.cross_entropy(before, labels[rows, places], reduction="none")
        return losses, words[before[:, words].argmax(dim=-1)]

    return judged
