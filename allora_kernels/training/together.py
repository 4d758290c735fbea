"""`finetune_together`: several runs over one base model in one process, a mixed batch a step."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from ..models.adapted import adapter_parameters, saved_modules
from ..models.adapters import adapter_rows, set_adapter
from ..models.async_saving import PendingSave, save_adapters_async
from ..models.loading import load_adapter
from .base_model import computes_in_bf16
from .config import FinetuneConfig
from .loss_plot import plot_loss
from .preparing import Prepared
from .progress import RunBars, StopOnInterrupt
from .run import evaluate, trainer_for
from .run_folder import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    PLOT_FILE,
    check_output,
    check_resumed,
    first_metrics,
    last_metrics,
    make_folder,
    save_beside_adapter,
    write_json,
)
from .steps import steps
from .together_checkpoints import (
    KEPT,
    drop_later_ones,
    drop_old_ones,
    random_state,
    read_state,
    set_random_state,
    whole_checkpoints,
    write_state,
)
from .together_preparing import check_together, prepare_together

if TYPE_CHECKING:
    from rich.console import Console


def finetune_together(
    configs: Mapping[str, FinetuneConfig], *, console: "Console | None" = None
) -> dict[str, dict[str, Any]]:
    """`finetune` of several runs at once: each has its own data, adapter, head, optimizer and schedule, and all share one base
    model and one forward and backward pass a step.

    A run takes the batches that it would take alone, from the same initial values, and its losses and gradients are those of
    its own samples: without dropout its result is the single run's, to rounding. Each writes the folder that `finetune`
    writes, checkpoints too. Where a run's loss becomes nan or infinite, that run ends and the others go on. Ctrl-C ends all
    after the current step. With ``config.resume`` all go on from the last step of which each has a checkpoint (each from its
    own last, where there is none), on the CPU to the same bits as without the interruption; a run that has ended is returned
    as it is.

    Args:
        configs: the runs by name, which becomes the adapter's. What belongs to the base model must be equal.
        console: where to show what is adapted and how far the runs are; None for nowhere.

    Returns:
        What each run's metrics.json holds, see `finetune`; ``status`` may also be ``"diverged"`` (then there is no ``adapter/``
        of the end). ``beside`` names the other runs, whose time and memory ``seconds`` and ``peak_memory_bytes`` include.

    Raises:
        ValueError, TypeError: what `finetune` raises them for in any of the runs; runs that do not fit together; more than one
            process. Nothing is written then.
    """
    check_together(configs)
    former = {name: check_output(config, together=True) for name, config in configs.items()}
    ended = {name: of for name, of in former.items() if of and of["status"] in ("finished", "diverged")}
    if len(ended) == len(configs):
        return ended
    prepared = prepare_together({name: config for name, config in configs.items() if name not in ended})
    model = next(iter(prepared.values())).model
    if console is not None:
        console.print(str(next(iter(prepared.values())).report), highlight=False, markup=False)
    runs = [_Run(name, configs[name], own) for name, own in prepared.items()]
    for run in runs:
        if of := former[run.name]:
            check_resumed(of, run.metrics, run.config)
    for run in runs:
        if former[run.name] is None:
            run.measure("before")
    for run in runs:
        run.metrics["before"] = run.metrics["before"] or former[run.name]["before"]
        run.metrics["beside"] = [name for name in configs if name != run.name]
        run.output = make_folder(run.config.output)
        write_json(run.metrics, run.output / METRICS_FILE)
    # As in a single run, whose evaluation before training draws random numbers, too.
    transformers.set_seed(runs[0].config.seed)
    _resume([run for run in runs if former[run.name]])
    _train(model, runs, console)
    for run in runs:
        if run.status == "finished":
            try:
                run.measure("after")
            except FloatingPointError:
                run.status = run.metrics["status"] = "diverged"
    if kept := [run for run in runs if run.status != "diverged"]:
        with _save(model, kept):
            for run in kept:
                (run.output / ADAPTER_FOLDER).mkdir(exist_ok=True)
                save_beside_adapter(run.output / ADAPTER_FOLDER, run.prepared)
    for run in runs:
        drop_old_ones(run.output)
        if run.history:
            plot_loss(run.metrics, run.output / PLOT_FILE)
        write_json(run.metrics, run.output / METRICS_FILE)
    found = ended | {run.name: run.metrics for run in runs}
    return {name: found[name] for name in configs}


class _Run:
    """One of the runs: what it trains, its batches, and how far it is."""

    def __init__(self, name: str, config: FinetuneConfig, prepared: Prepared) -> None:
        self.name, self.config, self.prepared = name, config, prepared
        self.metrics = first_metrics(config, prepared)
        model = prepared.model
        heads = saved_modules(model, name).values()
        self.parameters = [*adapter_parameters(model, name), *(p for head in heads for p in head.parameters())]
        trainable, all_trainable = sum(p.numel() for p in self.parameters), prepared.report.trainable
        frozen = prepared.report.total - all_trainable
        self.metrics["parameters"] = {"trainable": trainable, "total": frozen + trainable}
        self.trainer = trainer_for(config, prepared, adapter=name)
        self.total = steps(config, len(prepared.train))
        self.optimizer = self.trainer.create_optimizer()
        self.scheduler = self.trainer.create_scheduler(self.total, self.optimizer)
        self.steps = self._steps()
        self.history: list[list[float]] = []
        self.status, self.tokens, self.done = "interrupted", 0, 0
        self.tokens_before = 0
        self.output: Path

    def measure(self, when: str) -> None:
        """Evaluate, with this run's adapter."""
        set_adapter(self.prepared.model, self.name)
        self.metrics[when] = evaluate(self.trainer)

    def _steps(self) -> Iterator[tuple[list[dict[str, Tensor]], Tensor | int | None]]:
        """The micro-batches of each optimizer step, as the single run's Trainer takes them, and what its losses divide by."""
        loader = self.trainer.get_train_dataloader()
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            batches = iter(loader)
            while True:
                found = self.trainer.get_batch_samples(batches, self.config.grad_accumulation, self.trainer.args.device)
                if not found[0]:
                    break
                yield found

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the adapter."""
        return {
            "status": self.status,
            "step": self.done,
            "tokens": self.tokens,
            "loss_history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(),
        }

    def go_on(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Be where the run was at `checkpoint`, with its `state`."""
        load_adapter(self.prepared.model, checkpoint, adapter=self.name)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.status, self.done, self.history = state["status"], state["step"], state["loss_history"]
        self.tokens = self.tokens_before = state["tokens"]
        for _ in range(self.done):
            next(self.steps)

    def loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None, micro_batches: int) -> Tensor:
        """Of this run's rows, as the Trainer's: the sum over micro-batches is the step's loss."""
        if self.config.task == "classification":
            return self.trainer.compute_loss_func(SimpleNamespace(logits=logits), labels, num_items_in_batch=items)
        model = self.prepared.model
        kwargs = {} if items is None else {"num_items_in_batch": items}
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return loss if items is not None else loss / micro_batches

    def step(self, loss: float) -> None:
        """An optimizer step on the gradients that are there, after this loss; or the end, where the loss is no number."""
        self.done += 1
        if not math.isfinite(loss):
            self.status = "diverged"
        else:
            self.history.append([self.done, loss])
            if self.config.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            if self.done == self.total:
                self.status = "finished"
        self.optimizer.zero_grad()


def _train(model: nn.Module, runs: list[_Run], console: "Console | None") -> None:
    """Train until all runs are done. What was saved is written at the end, also where training fails."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pending, started = None, time.perf_counter()
    model.train()
    try:
        with ExitStack() as watchers:
            stop = watchers.enter_context(StopOnInterrupt(console))
            bars = watchers.enter_context(RunBars(console, {run.name: run.total for run in runs})) if console else None
            while stop.asked_at is None and (active := [run for run in runs if run.status == "interrupted"]):
                losses = _mixed_step(model, active)
                for run, loss in zip(active, losses):
                    run.step(loss)
                seconds = time.perf_counter() - started
                for run in active:
                    run.metrics["seconds"] = seconds
                if bars is not None:
                    tokens = sum(run.tokens - run.tokens_before for run in runs)
                    shown = {run.name: (run.done, loss) for run, loss in zip(active, losses)}
                    bars.show(shown, tokens / seconds)
                # All at once, so that they can go on from one step; and a run that has ended, which has no later one.
                all_due = stop.asked_at is not None or any(run.done % run.config.save_steps == 0 for run in active)
                if due := [run for run in active if all_due or run.status != "interrupted"]:
                    if pending is not None:
                        pending.wait()
                    pending = _checkpoint(model, due)
    finally:
        if pending is not None:
            pending.wait()
    for run in runs:
        seconds = run.metrics.get("seconds", 0.0)
        run.metrics |= last_metrics(run.status, run.done, run.tokens, run.tokens_before, seconds, run.history)


def _mixed_step(model: nn.Module, active: list[_Run]) -> list[float]:
    """A forward and backward pass over the next micro-batches of all runs, as often as the one with most has them; the loss of
    each run's step."""
    taken = [next(run.steps) for run in active]
    losses = [torch.zeros((), device=run.trainer.args.device) for run in active]
    bf16 = computes_in_bf16(active[0].config)
    for j in range(max(len(batches) for batches, _ in taken)):
        parts = [
            (i, run, batches[j], items, len(batches))
            for i, (run, (batches, items)) in enumerate(zip(active, taken))
            if j < len(batches)
        ]
        inputs, names = _merged([(run, batch) for _, run, batch, _, _ in parts])
        with (
            torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16),
            adapter_rows(model, names),
        ):
            logits = model(**inputs).logits
        logits, start, total = logits.float(), 0, 0.0
        for i, run, batch, items, count in parts:
            rows, labels = slice(start, start + len(batch["labels"])), batch["labels"]
            own = logits[rows] if labels.dim() == 1 else logits[rows, : labels.shape[1]]
            loss = run.loss(own, labels, items, count)
            losses[i] += loss.detach()
            total, start = total + loss, rows.stop
        total.backward()
    return torch.stack(losses).tolist()


def _merged(parts: list[tuple[_Run, dict[str, Tensor]]]) -> tuple[dict[str, Tensor], list[str]]:
    """The runs' micro-batches as one, without labels, padded behind so that every token keeps its place; and the run of each
    row."""
    tokenizer = parts[0][0].prepared.tokenizer
    padding = {"input_ids": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0}
    length = max(batch["input_ids"].shape[1] for _, batch in parts)
    inputs, names = {}, []
    for key in parts[0][1].keys() - {"labels"}:
        inputs[key] = torch.cat(
            [
                nn.functional.pad(batch[key], (0, length - batch[key].shape[1]), value=padding.get(key, 0))
                for _, batch in parts
            ]
        )
    for run, batch in parts:
        real = batch.get("attention_mask")
        run.tokens += int(real.sum()) if real is not None else batch["input_ids"].numel()
        names += [run.name] * len(batch["input_ids"])
    return inputs, names


def _resume(runs: list[_Run]) -> None:
    """Bring these runs where they were at the last step of which all have a checkpoint; each to its own last, where there is no
    such step."""
    found = {run: whole_checkpoints(run.output) for run in runs}
    common, states = _last_common_step([*found.values()]), []
    for run, checkpoints in found.items():
        step = max((step for step in checkpoints if common is None or step <= common), default=0)
        if step:
            state = read_state(checkpoints[step])
            run.go_on(checkpoints[step], state)
            states.append(state)
        drop_later_ones(run.output, step)
    if states:
        # One stream of random numbers for all: that of the runs that are furthest.
        set_random_state(max(states, key=lambda state: state["step"])["random"])


def _last_common_step(found: list[dict[int, Path]]) -> int | None:
    """The last step where each of some runs, with these checkpoints, can begin or has ended; None where there is none."""
    known, one_begins = [], not all(found)
    for checkpoints in found:
        last = max(checkpoints, default=0)
        ended = last > 0 and read_state(checkpoints[last])["status"] != "interrupted"
        # A run with fewer than are kept had none before them, and can begin with one that has none.
        beginning = {0} if one_begins and len(checkpoints) < KEPT else set()
        known.append(({*checkpoints} | beginning, last if ended else math.inf))
    steps = set().union(*(own for own, _ in known))
    return max((s for s in steps if all(s in own or s >= end for own, end in known)), default=None)


def _checkpoint(model: nn.Module, runs: list[_Run]) -> PendingSave:
    """Begin a checkpoint of each of these runs, whose former ones are written."""
    for run in runs:
        drop_old_ones(run.output)
    folders = {run.name: write_state(run.output, run.done, run.state()) for run in runs}
    return save_adapters_async(model, folders, base_model_name_or_path=runs[0].config.model)


def _save(model: nn.Module, runs: list[_Run]) -> PendingSave:
    folders = {run.name: run.output / ADAPTER_FOLDER for run in runs}
    return save_adapters_async(model, folders, base_model_name_or_path=runs[0].config.model)
