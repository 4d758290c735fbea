"""Runs that show LoRA's three flaws in short training, as the ALLoRA paper names them: one cell a line of a figure.

1. dropout: what dropout on the adapter's input adds to the loss, one random mask at a time, at one point of training.
2. norms: how far B and BA have come from zero, by step.
3. scaling: what the trained model answers when alpha (of ALLoRA: eta) is multiplied in all layers, or in half of them.

The model's own dropout is off in all of them, so that nothing else is random but the order of the data.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from .cells import OPTIMIZERS, Record, Settings, identity
from .methods import ALLORA, LORA, LORA_2_DROPOUT, LORA_DROPOUT, METHODS, Method
from .tasks import TASKS
from .training import LOOP

TASK = "election-tweets"
RATES = {"adamw": 1e-3, "sgd": 0.1}
"""One learning rate for all methods: these figures are about what a method does at the same setting."""
MULTIPLIERS = (0.25, 0.5, 2.0, 4.0)
PLACES = ("all", "lower", "upper")
SHOWN = 64
"""Validation texts whose logits are kept."""


def _settings(kind: str, method: Method, optimizer: str, steps: int, seed: int, **more: Any) -> Settings:
    return {
        "kind": kind,
        "loop": LOOP,
        "task": TASKS[TASK].settings(),
        "method": method.settings(),
        "optimizer": {"name": optimizer, **OPTIMIZERS[optimizer]},
        "steps": steps,
        "samples": None,
        "learning_rate": RATES[optimizer],
        "seed": seed,
        **more,
    }


def dropout_cell(method: Method, steps: int, masks: int, seed: int) -> Settings:
    """`masks` random masks after `steps` steps of training."""
    return _settings("dropout", method, "adamw", steps, seed, masks=masks)


def norms_cell(method: Method, optimizer: str, steps: int, seed: int) -> Settings:
    """The norms after each of `steps` steps."""
    return _settings("norms", method, optimizer, steps, seed)


def scaling_cell(method: Method, optimizer: str, steps: int, multiplier: float, place: str, seed: int) -> Settings:
    """Training with alpha or eta times `multiplier` in the layers of `place`."""
    return _settings("scaling", method, optimizer, steps, seed, multiplier=multiplier, place=place)


def cells(steps: int = 100, seeds: tuple[int, ...] = (0, 1, 2)) -> list[Settings]:
    """All runs of the three figures."""
    return [
        *(dropout_cell(method, steps, 800, seed) for method in (LORA_DROPOUT, LORA_2_DROPOUT) for seed in seeds[:1]),
        *(
            norms_cell(method, optimizer, steps, seed)
            for optimizer in ("adamw", "sgd")
            for seed in seeds
            for method in (LORA, LORA_DROPOUT, ALLORA)
        ),
        *scaling_cells(steps, ("adamw", "sgd"), MULTIPLIERS),
    ]


def quick_cells() -> list[Settings]:
    """A few shorter runs of each figure."""
    return [
        dropout_cell(LORA_DROPOUT, 25, 100, 0),
        *(norms_cell(m, optimizer, 25, 0) for optimizer in ("adamw", "sgd") for m in (LORA, LORA_DROPOUT, ALLORA)),
        *scaling_cells(25, ("sgd",), (0.5, 2.0)),
    ]


def scaling_cells(steps: int, optimizers: tuple[str, ...], multipliers: tuple[float, ...]) -> list[Settings]:
    """For LoRA's alpha and ALLoRA's eta: the run to compare with, then each multiplier in each place."""
    return [
        scaling_cell(method, optimizer, steps, multiplier, place, 0)
        for optimizer in optimizers
        for method in (LORA, ALLORA)
        for multiplier, place in [(1.0, "all"), *((m, p) for m in multipliers for p in PLACES)]
    ]


# --- running them ---------------------------------------------------------------------------------------------------


def run_cell(settings: Settings, folder: str | None = None) -> Record:
    """Train, and look at what the kind of cell is about.

    Raises:
        ValueError: settings of another version of the study.
    """
    from . import training
    from .methods import build
    from .tasks import training_parts

    task, method, kind = TASKS[settings["task"]["name"]], METHODS[settings["method"]["name"]], settings["kind"]
    optimizer, steps, rate, seed = (settings[key] for key in ("optimizer", "steps", "learning_rate", "seed"))
    own = ("masks", "multiplier", "place")
    expected = _settings(kind, method, optimizer["name"], steps, seed, **{k: settings[k] for k in own if k in settings})
    if expected != settings:
        raise ValueError("the cell was run with other settings of its task, method or optimizer than this study has")
    started = time.monotonic()
    model = build(task, method, seed)
    silence_own_dropout(model)
    norms = NormsByStep(model) if kind == "norms" else None
    if kind == "scaling":
        multiply(model, method, settings["multiplier"], settings["place"])
    with training.scratch_folder(folder) as output:
        trainer = training.make_trainer(
            task, method, optimizer["name"], steps, None, rate, seed, output, [norms.callback()] if norms else [], model
        )
        went = training.train(trainer)
        found: dict[str, Any] = {"validation": training.measure(trainer, training_parts(task)[1])}
        if norms:
            found |= {"B": norms.b, "BA": norms.ba}
        elif kind == "dropout":
            found["differences"] = mask_differences(trainer, settings["masks"])
        else:
            found["logits"] = some_logits(trainer, training_parts(task)[1])
    record = {"id": identity(settings), "settings": settings, **went, **found}
    return record | {"total_seconds": round(time.monotonic() - started, 2), "versions": training.versions()}


def silence_own_dropout(model) -> None:
    """Turn off every dropout but the adapters'."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def multiply(model, method: Method, multiplier: float, place: str) -> None:
    """Multiply alpha (of ALLoRA: eta) in all layers, or in the lower or the upper half of them.

    Raises:
        ValueError: another place.
    """
    from .methods import adapted_layers

    layers = list(adapted_layers(model).values())
    half = len(layers) // 2
    places = {"all": layers, "lower": layers[:half], "upper": layers[half:]}
    if place not in places:
        raise ValueError(f"place must be one of {', '.join(places)}, got {place!r}")
    for layer in places[place]:
        if method.kind == "allora":
            layer.set_rule("default", math.sqrt(method.eta_squared) * multiplier, method.norm)
        else:
            layer.set_scale("default", multiplier * method.alpha)


class NormsByStep:
    """‖B‖ and ‖BA‖ (Frobenius, mean over the layers) after each step; BA with alpha/r."""

    def __init__(self, model) -> None:
        from .methods import adapted_layers

        self.layers = list(adapted_layers(model).values())
        self.b: list[float] = []
        self.ba: list[float] = []

    def note(self) -> None:
        """Append what the norms are now."""
        from allora_kernels.reference import matrix_norm

        b = [layer.lora_B["default"].weight.detach() for layer in self.layers]
        ba = [
            layer.scaling["default"] * matrix_norm(layer.lora_A["default"].weight.detach(), factor).item()
            for layer, factor in zip(self.layers, b)
        ]
        self.b.append(_digits(sum(factor.norm().item() for factor in b) / len(b)))
        self.ba.append(_digits(sum(ba) / len(ba)))

    def callback(self):
        """For a Trainer."""
        return _at_each_step(self.note)


def _at_each_step(note: Callable[[], None]):
    from transformers import TrainerCallback

    class AtEachStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            note()

    return AtEachStep()


def mask_differences(trainer, masks: int) -> list[float]:
    """Loss on one training batch with each of `masks` random dropout masks, minus the loss without."""
    import torch

    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    with torch.no_grad():
        plain = model.eval()(**batch).loss.item()
        model.train()
        return [_digits(model(**batch).loss.item() - plain) for _ in range(masks)]


def some_logits(trainer, rows) -> list[list[float]]:
    """The logits of the first SHOWN rows."""
    import torch

    batch = trainer.data_collator([rows[i] for i in range(min(SHOWN, len(rows)))])
    with torch.no_grad():
        return [[_digits(value) for value in row] for row in trainer.model.eval()(**batch).logits.tolist()]


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
