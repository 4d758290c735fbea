"""What watches a training run: the progress bar, Ctrl-C, and losses that are no numbers."""

import math
import signal
import sys
import threading
import time
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


def peak_memory() -> int:
    """Bytes: the most this process has had allocated on the GPU, or, without one, resident in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows has none
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProgressBar(TrainerCallback):
    """A line with steps, loss, tokens a second and peak memory; a context manager, so that errors end it too."""

    def __init__(self, console: Console):
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TextColumn("{task.fields[memory]:.1f} GiB"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss=0, rate=0, memory=0)
        self.started, self.tokens_before = self.bar.get_time(), state.num_input_tokens_seen
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        rate = (state.num_input_tokens_seen - self.tokens_before) / (self.bar.get_time() - self.started)
        memory = peak_memory() / 2**30
        self.bar.update(self.task, completed=state.global_step, loss=logs["loss"], rate=rate, memory=memory)


class RunBars:
    """A line for each of several runs that train together; a context manager, so that errors end it too."""

    def __init__(self, console: Console, totals: Mapping[str, int]):
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.tasks = {name: self.bar.add_task(name, total=total, loss=0, note="") for name, total in totals.items()}

    def __enter__(self) -> "RunBars":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def show(self, losses: Mapping[str, tuple[int, float]], tokens_per_second: float) -> None:
        """The (steps done, last loss) of each run that is not over, and the speed of all together."""
        note = f"{tokens_per_second:,.0f} tokens/s in all, {peak_memory() / 2**30:.1f} GiB"
        for name, (done, loss) in losses.items():
            self.bar.update(self.tasks[name], completed=done, loss=loss, note=note)


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save a checkpoint, stop. The second one interrupts at once.

    Between two steps everything a checkpoint holds belongs together; in the middle of one it does not, and the
    resumed run would be another. Outside the main thread, where Python delivers no signals, it does nothing. Of several
    processes all stop after the same step, the first that any of them can; a signal within a second of the first is the
    same one, which torchrun passes on besides.
    """

    def __init__(self, console: Console | None = None):
        self.asked_at: float | None = None
        self.console = console

    def __enter__(self) -> "StopOnInterrupt":
        self.installed = threading.current_thread() is threading.main_thread()
        if self.installed:
            self.former = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, self.former)

    def _interrupt(self, signum, frame) -> None:
        if self.asked_at is not None:
            if _processes() > 1 and time.monotonic() - self.asked_at < 1.0:
                return
            raise KeyboardInterrupt
        self.asked_at = time.monotonic()
        if self.console is not None:
            self.console.print("Stopping after this step and saving; Ctrl-C again stops at once.")

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked_at is not None
        if _processes() > 1:
            # Trainer reads the loss back in each step, so this adds no wait for the device.
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            control.should_save = control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Raises FloatingPointError when the loss is nan or infinite, before such a model is saved."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss became {logs['loss']} at step {state.global_step}: lower the learning rate (now "
                f"{args.learning_rate:g}) or eta, or warm up"
            )
