"""`FinetuneConfig`: every setting of a fine-tuning run, with its default, its meaning and its limits."""

import math
from dataclasses import dataclass, fields
from typing import Annotated

from ..layer.functional import check_rule
from ..reference import NORMS

TASKS = ("classification", "causal-lm")
SCHEDULES = ("linear", "cosine", "constant")
QUANTIZATIONS = ("4bit", "8bit")
LEARNING_RATES = {"adamw": 1e-3, "sgd": 0.1}
"""The optimizers, and the learning rate each has where none is given."""

_SMALLEST = {
    "max_length": 2, "warmup_steps": 0, "max_steps": 1, "batch_size": 1, "grad_accumulation": 1, "save_steps": 1, "seed": 0,
}  # fmt: skip
_NUMBERS = {
    "learning_rate": False, "loraplus_lr_ratio": False, "head_learning_rate": False, "epochs": False,
    "momentum": True, "weight_decay": True, "max_grad_norm": True,
}  # fmt: skip
"""Settings that are finite numbers: whether they may be zero."""
_SWITCHES = {"bf16": True, "experts": False, "gradient_checkpointing": False, "shuffle": False, "resume": False}
"""Settings that are on or off: whether they may be left open."""
_FREE_ON_RESUME = ("output", "save_steps", "resume")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `finetune`; the command line's options are these fields.

    Raises:
        ValueError, TypeError: on construction, where a value is out of its range or of the wrong type.
    """

    model: Annotated[str, "Folder of a transformers model, or its name on the hub."]
    data: Annotated[str, "CSV, TSV, JSONL or text file, or the name of a data set on the hub."]
    output: Annotated[str, "Folder for the adapter, metrics.json, loss.png and checkpoints."]
    task: Annotated[str, "classification or causal-lm."] = "classification"
    text_column: Annotated[str, "Column (key) of the text."] = "text"
    label_column: Annotated[str, "Column (key) of the label; classification only."] = "label"
    eval_data: Annotated[str | None, "File or data set to evaluate on; else a part of --data is held out."] = None
    eval_fraction: Annotated[float, "Part of --data that is held out where there is no --eval-data."] = 0.1
    max_length: Annotated[int | None, "Tokens of a text or block; by default 512, or less where the model ends."] = None
    r: Annotated[int, "Rank of the adapters, 1 to 256."] = 16
    eta: Annotated[float, "ALLoRA's coefficient where the adapter is zero, > 0."] = 2.0
    norm: Annotated[str | None, "ALLoRA's rule: row, matrix, factor, entry, token, or none for plain LoRA."] = "row"
    target_modules: Annotated[list[str], "Layers to adapt: a name (repeat the option for more) or all-linear."] = (
        "all-linear",
    )
    experts: Annotated[
        bool, "Also adapt the experts of a mixture, where transformers keeps them as 3-D parameters."
    ] = False
    optimizer: Annotated[str, "adamw or sgd."] = "adamw"
    learning_rate: Annotated[float | None, "Peak learning rate; by default 1e-3 for adamw, 0.1 for sgd."] = None
    loraplus_lr_ratio: Annotated[float, "LoRA+: lora_B's learning rate over lora_A's; 1 for the same."] = 1.0
    head_learning_rate: Annotated[float | None, "The classification head's; by default --learning-rate."] = None
    momentum: Annotated[float, "Momentum of sgd."] = 0.0
    weight_decay: Annotated[float, "Weight decay."] = 0.0
    max_grad_norm: Annotated[float, "Clip the gradient to this norm; 0 for no clipping."] = 1.0
    schedule: Annotated[str, "Learning rate after the warmup: linear, cosine or constant."] = "linear"
    warmup_steps: Annotated[int, "Steps in which the learning rate rises from zero."] = 0
    epochs: Annotated[float, "Passes over the training data."] = 3.0
    max_steps: Annotated[int | None, "Optimizer steps; overrides --epochs."] = None
    batch_size: Annotated[int, "Texts or blocks of a forward pass."] = 16
    grad_accumulation: Annotated[int, "Forward passes of an optimizer step."] = 1
    bf16: Annotated[bool | None, "Compute in bfloat16; by default where a GPU supports it."] = None
    quantize: Annotated[
        str | None,
        "Store the frozen linear layers in 4bit (nf4) or 8bit, by bitsandbytes; none: as the checkpoint is.",
    ] = None
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass to save memory."] = False
    save_steps: Annotated[int, "Steps from one checkpoint to the next; the last two are kept."] = 200
    shuffle: Annotated[bool, "Take the training data in random order, another in each epoch."] = True
    seed: Annotated[int, "Seed of the split, the initial values, the data order and dropout."] = 0
    resume: Annotated[bool, "Continue the run in --output from its last checkpoint."] = False

    def __post_init__(self) -> None:
        _choice("task", self.task, TASKS)
        _choice("optimizer", self.optimizer, LEARNING_RATES)
        _choice("schedule", self.schedule, SCHEDULES)
        if self.quantize is not None:
            _choice("quantize", self.quantize, QUANTIZATIONS)
        check_rule(self.r, self.eta, self.norm)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimizer])
        targets = _names("target_modules", self.target_modules)
        object.__setattr__(self, "target_modules", targets)
        if not targets or ("all-linear" in targets and len(targets) > 1):
            raise ValueError(f"target_modules must be names of layers, or all-linear alone, got {list(targets)}")
        for name in ("model", "data", "output", "text_column", "label_column"):
            _text(name, getattr(self, name))
        if self.eval_data is not None:
            _text("eval_data", self.eval_data)
        for name, optional in _SWITCHES.items():
            _switch(name, getattr(self, name), optional)
        for name, smallest in _SMALLEST.items():
            _integer(name, getattr(self, name), smallest, optional=name in ("max_length", "max_steps"))
        for name, zero in _NUMBERS.items():
            _number(name, getattr(self, name), zero, optional=name == "head_learning_rate")
        _number("eval_fraction", self.eval_fraction, zero=False)
        if self.eval_fraction >= 1:
            raise ValueError(f"eval_fraction must be > 0 and < 1, got {self.eval_fraction}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is for optimizer='sgd', got {self.momentum} with {self.optimizer!r}")
        if self.head_learning_rate and self.task != "classification":
            raise ValueError("head_learning_rate is for task='classification', where a head is trained")

    def as_json(self) -> dict:
        """Every setting by name, in types that JSON has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"target_modules": list(self.target_modules)}

    def changed_since(self, former: dict) -> list[str]:
        """The settings that differ from a run with `former` settings (an `as_json`) and would make it another run. One that
        `former` lacks did not exist yet: the run had what is its default now."""
        mine = self.as_json()
        before = {field.name: field.default for field in fields(self)} | former
        return [name for name in mine if name not in _FREE_ON_RESUME and mine[name] != before[name]]


def without_none(settings: dict) -> dict:
    """Settings as a command line or a file has them, where ``none`` is a word; ValueError where norm is another than theirs."""
    norm, words = settings.get("norm"), [rule or "none" for rule in NORMS]
    if isinstance(norm, str) and norm not in words:
        raise ValueError(f"norm must be one of {', '.join(words)}, got {norm!r}")
    return settings | {name: None for name in ("norm", "quantize") if settings.get(name) == "none"}


def _choice(name: str, value, choices) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _wrong_type(name: str, right: str, value) -> TypeError:
    return TypeError(f"{name} must be {right}, got {value!r} ({type(value).__name__})")


def _names(name: str, value) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        raise _wrong_type(name, "a str or a list of them", value)
    return tuple(names)


def _switch(name: str, value, optional: bool) -> None:
    if not isinstance(value, bool) and not (optional and value is None):
        raise _wrong_type(name, "a bool (true or false)", value)


def _text(name: str, value) -> None:
    if not isinstance(value, str):
        raise _wrong_type(name, "a str", value)
    if not value:
        raise ValueError(f"{name} must not be empty")


def _integer(name: str, value, smallest: int, optional: bool) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, "an int", value)
    if value < smallest:
        raise ValueError(f"{name} must be >= {smallest}, got {value}")


def _number(name: str, value, zero: bool, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong_type(name, "a number", value)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, got {value}")
