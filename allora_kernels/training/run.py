"""`finetune`: one training run with ALLoRA adapters, on transformers' own Trainer."""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..models.adapted import adapter_parameter_groups, saved_modules
from ..models.loading import load_adapter
from ..models.saving import save_adapter
from .adapter_trainer import AdapterTrainer
from .base_model import computes_in_bf16
from .config import FinetuneConfig
from .loss_plot import plot_loss
from .machine import rank
from .preparing import Prepared, collator, prepare
from .progress import ProgressBar, StopOnInterrupt, StopOnNonFinite
from .run_folder import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    PLOT_FILE,
    check_output,
    check_resumed,
    checkpoints,
    first_metrics,
    last_metrics,
    make_folder,
    save_beside_adapter,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

_STATE_FILE = "trainer_state.json"


def finetune(
    config: FinetuneConfig, *, callbacks: Iterable[TrainerCallback] = (), console: "Console | None" = None
) -> dict[str, Any]:
    """Evaluate, train adapters on the model, evaluate again.

    Everything that can be wrong with the settings, the data and the model is found before anything is written. Then
    ``config.output`` gets ``adapter/`` (PEFT's format), ``metrics.json``, ``loss.png`` and the last two checkpoints,
    which hold the adapter, the optimizer and the random state but not the model. Ctrl-C ends the run after the current
    step with all of these; ``config.resume`` continues it, on the CPU to the same bits as without the interruption
    (a run that is finished is returned as it is).

    Under torchrun or accelerate every process calls this with the same config and reads the data; a step's batch is then
    ``batch_size * grad_accumulation`` texts or blocks a process, gradients are averaged by DistributedDataParallel, and the
    first process writes. ``config.output`` must be a folder that all of them see.

    Args:
        config: the settings.
        callbacks: more callbacks for the Trainer.
        console: where the first process shows what is adapted and how far training is; None for nowhere.

    Returns:
        What metrics.json holds. ``status`` is ``"finished"`` or ``"interrupted"``; ``before`` and ``after`` have the
        ``loss`` on the evaluation data (nats a text or token) and ``accuracy`` or ``perplexity`` (``after`` is None if
        interrupted); ``loss_history`` has ``[step, training loss]``; ``tokens`` and ``tokens_per_second`` (padding not
        counted) are of all processes together, ``seconds`` and ``peak_memory_bytes`` of this one.

    Raises:
        ValueError, TypeError: settings, data, model and output folder that do not work or do not fit together.
        FloatingPointError: the loss became nan or infinite; no such adapter is saved.
    """
    former = check_output(config)
    console = console if rank() == 0 else None
    if former and former["status"] == "finished":
        return former
    prepared = prepare(config)
    metrics = first_metrics(config, prepared)
    if former:
        check_resumed(former, metrics, config)
    if console is not None:
        console.print(str(prepared.report), highlight=False, markup=False)

    trainer = trainer_for(config, prepared, [StopOnNonFinite(), *callbacks])
    metrics["before"] = former["before"] if former else evaluate(trainer)
    # Before the first process writes, all of them have looked at what is there.
    trainer.accelerator.wait_for_everyone()
    output, writes = make_folder(config.output), trainer.is_world_process_zero()
    if writes:
        write_json(metrics, output / METRICS_FILE)
    _train(trainer, _last_checkpoint(output) if former else None, console, metrics)
    if metrics["status"] == "finished":
        metrics["after"] = evaluate(trainer)
    if writes:
        save_adapter(prepared.model, output / ADAPTER_FOLDER, base_model_name_or_path=config.model)
        save_beside_adapter(output / ADAPTER_FOLDER, prepared)
        plot_loss(metrics, output / PLOT_FILE)
        write_json(metrics, output / METRICS_FILE)
    trainer.accelerator.wait_for_everyone()
    return metrics


# --- pieces that another training run can use too -------------------------------------------------------------------


def trainer_for(
    config: FinetuneConfig, prepared: Prepared, callbacks: Iterable[TrainerCallback] = (), adapter: str | None = None
) -> "FinetuneTrainer":
    """The trainer of a run on what was prepared for it, which prints nothing."""
    trainer = FinetuneTrainer(
        config,
        adapter,
        model=prepared.model,
        args=training_arguments(config),
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        data_collator=collator(prepared.tokenizer, prepared.names),
        processing_class=prepared.tokenizer,
        callbacks=[*callbacks],
        **classification_hooks(bool(prepared.names)),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def training_arguments(config: FinetuneConfig, **overrides) -> TrainingArguments:
    """transformers' arguments for `config`; `overrides` are arguments of TrainingArguments."""
    bf16 = computes_in_bf16(config)
    settings = {
        "output_dir": str(Path(config.output).expanduser()),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": 2 * config.batch_size,
        "gradient_accumulation_steps": config.grad_accumulation,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        # transformers' "constant" has no warmup; with none asked for the two are the same.
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": config.warmup_steps,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "bf16": bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": config.seed,
        "data_seed": config.seed,
        # Each step is logged: a loss summed over several would lose its part before a checkpoint on resume.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }
    if not config.shuffle:
        settings["train_sampling_strategy"] = "sequential"
    arguments = TrainingArguments(**(settings | overrides))
    if arguments.n_gpu > 1:
        # With several GPUs in one process Trainer would use nn.DataParallel and multiply the batch size by their number.
        arguments._n_gpu = 1
    return arguments


def classification_hooks(classification: bool) -> dict[str, Any]:
    """Trainer's arguments for the loss and the measures of a classifier, or (False) of a language model on blocks of one
    length. `evaluate` gives ``eval_mean_loss``, the mean over rows: Trainer's own ``eval_loss`` counts rows twice that fill
    up the last batches of several processes."""

    def loss(outputs, labels, num_items_in_batch=None):
        # Several classifiers of transformers take num_items_in_batch and leave it unused, and Trainer, believing that
        # they divided by it, adds up the gradients it accumulates where it should average them.
        total = nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def measured(logits, labels):
        logits = (logits[0] if isinstance(logits, tuple) else logits).float()
        if classification:
            return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1)
        losses = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").mean(dim=-1)
        return losses, losses.new_empty(len(losses), 0)

    def means(prediction):
        losses, chosen = prediction.predictions
        result = {"mean_loss": float(losses.mean())}
        return result | {"accuracy": float((chosen == prediction.label_ids).mean())} if classification else result

    hooks = {"preprocess_logits_for_metrics": measured, "compute_metrics": means}
    return {"compute_loss_func": loss, **hooks} if classification else hooks


class FinetuneTrainer(AdapterTrainer):
    """An `AdapterTrainer` with `config`'s optimizer, of one adapter where the model has several."""

    def __init__(self, config: FinetuneConfig, adapter: str | None = None, **kwargs):
        self.adapter = adapter
        super().__init__(**kwargs)
        self.config, self.base_model_name_or_path = config, config.model

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        config = self.config
        in_heads = {p for head in saved_modules(self.model, self.adapter).values() for p in head.parameters()}
        groups = [
            *adapter_parameter_groups(
                self.model, config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio, adapter=self.adapter
            ),
            {
                "params": [p for p in self.model.parameters() if p.requires_grad and p in in_heads],
                "lr": config.head_learning_rate or config.learning_rate,
            },
        ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        # Evaluation takes all outputs, in their order: a mixture's auxiliary loss can be before the logits.
        return (loss, {"logits": outputs["logits"]}) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        # The tokenizer and the settings lie beside the checkpoints.
        self.save_adapters(output_dir, state_dict)


# --- during training ------------------------------------------------------------------------------------------------


class _SaveAsAsked(TrainerCallback):
    """Lets a resumed run save at the steps that it is asked for now: Trainer takes those of the checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.save_steps = args.save_steps


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Loss on the evaluation data, and accuracy or perplexity; FloatingPointError where the loss is nan or infinite."""
    measured = trainer.evaluate()
    result = {"loss": measured["eval_mean_loss"]}
    if not math.isfinite(result["loss"]):
        steps = trainer.state.global_step
        what = (
            "lower the learning rate or eta, or warm up" if steps else "the model itself gives it, before any training"
        )
        raise FloatingPointError(f"the loss on the evaluation data is {result['loss']} after {steps} steps: {what}")
    if "eval_accuracy" in measured:
        return result | {"accuracy": measured["eval_accuracy"]}
    return result | {"perplexity": math.exp(min(result["loss"], 700.0))}


def _train(trainer: Trainer, checkpoint: Path | None, console: "Console | None", metrics: dict[str, Any]) -> None:
    """Train, and note in `metrics` how it went."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = _state(checkpoint) if checkpoint else {"global_step": 0, "max_steps": 1, "num_input_tokens_seen": 0}
    seconds = 0.0
    # The evaluation before has drawn random numbers, which a run that starts over has not done again. Each process drops
    # out other activations.
    transformers.set_seed(trainer.args.seed + trainer.args.process_index)
    if before["global_step"] >= before["max_steps"]:
        # Only the last evaluation is missing. Trainer would take one more step.
        load_adapter(trainer.model, checkpoint)
        trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
    else:
        with ExitStack() as watchers:
            trainer.add_callback(_SaveAsAsked())
            for watcher in (StopOnInterrupt(console), *([ProgressBar(console)] if console else [])):
                trainer.add_callback(watchers.enter_context(watcher))
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = result.metrics["train_runtime"]
    state = trainer.state
    metrics |= last_metrics(
        status="finished" if state.global_step >= state.max_steps else "interrupted",
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        tokens_before=before["num_input_tokens_seen"],
        seconds=seconds,
        loss_history=[[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
    )


def _last_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint: one whose state, which is written last, can be read."""
    for folder in reversed(checkpoints(output).values()):
        try:
            _state(folder)
        except (OSError, json.JSONDecodeError):
            continue
        return folder
    return None


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
