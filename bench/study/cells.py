"""A cell: one training run by its settings, which are its identity. Also the rule that guards the test part."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, OPTIMIZERS, RATES, Method
from .tasks import TASKS, Task
from .training import LOOP

TUNING_SEEDS = (0,)
"""Seeds of the runs a learning rate is chosen by; not among those that are judged."""
SEEDS = (1, 2, 3, 4, 5)

Settings = dict[str, Any]
Record = dict[str, Any]


def identity(settings: Mapping[str, Any]) -> str:
    """16 hex digits that any changed setting changes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Group:
    """One method on one task with one optimizer and budget: the runs that choose its learning rate, then those judged."""

    task: Task
    method: Method
    optimizer: str
    steps: int
    samples: int | None = None
    """Rows to train on; None for all."""

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from; nothing is chosen for a model that is not trained."""
        return (0.0,) if self.method.kind == "frozen" else RATES[self.optimizer]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that are judged; one where nothing is random."""
        return SEEDS[:1] if self.method.kind == "frozen" else SEEDS

    def settings(self, phase: str, rate: float, seed: int) -> Settings:
        """Of one cell; `phase` is "tune" (validation only) or "final" (test too)."""
        return {
            "kind": "train",
            "phase": phase,
            "loop": LOOP,
            "task": self.task.settings(),
            "method": self.method.settings(),
            "optimizer": {"name": self.optimizer, **OPTIMIZERS[self.optimizer]},
            "steps": self.steps,
            "samples": self.samples,
            "learning_rate": rate,
            "seed": seed,
        }

    def tuning(self) -> list[Settings]:
        """The cells that a learning rate is chosen by."""
        return [self.settings("tune", rate, seed) for rate in self.rates for seed in TUNING_SEEDS]

    def final(self, rate: float) -> list[Settings]:
        """The cells that are judged, at the chosen learning rate."""
        return [self.settings("final", rate, seed) for seed in self.seeds]


def group_of(settings: Settings) -> Group:
    """The group that a cell of kind "train" belongs to.

    Raises:
        ValueError: settings of another version of the study.
    """
    try:
        task, method = TASKS[settings["task"]["name"]], METHODS[settings["method"]["name"]]
        group = Group(task, method, settings["optimizer"]["name"], settings["steps"], settings["samples"])
    except KeyError as error:
        raise ValueError(f"the cell names {error}, which this study does not have") from None
    if group.settings(settings["phase"], settings["learning_rate"], settings["seed"]) != settings:
        raise ValueError("the cell was run with other settings of its task, method or optimizer than this study has")
    return group


def choose_rate(group: Group, tuned: Sequence[Record]) -> float | None:
    """The learning rate with the best mean metric on the validation part; of equals the one with the lower loss.

    None where every one diverged. `tuned` are the records of `group.tuning()`.

    Raises:
        ValueError: some of them are missing.
    """
    found = {record["id"]: record for record in tuned}
    missing = [s["learning_rate"] for s in group.tuning() if identity(s) not in found]
    if missing:
        raise ValueError(f"no learning rate can be chosen yet: {missing} have not been tried")
    scores = {}
    for rate in group.rates:
        records = [found[identity(group.settings("tune", rate, seed))] for seed in TUNING_SEEDS]
        if all(map(_has_a_score, records)):
            metric = sum(group.task.sign * r["validation"][group.task.metric] for r in records)
            scores[rate] = (metric, -sum(r["validation"]["loss_mean"] for r in records))
    return max(scores, key=scores.__getitem__) if scores else None


def _has_a_score(record: Record) -> bool:
    # What is no number was written down as None.
    loss = record["validation"]["loss_mean"]
    return not record["diverged"] and loss is not None and math.isfinite(loss)


def check_may_test(settings: Settings, tuned: Sequence[Record]) -> None:
    """The test part is for the seeds at the chosen learning rate and nothing else.

    Raises:
        ValueError: another learning rate, or one that cannot be chosen yet.
    """
    group = group_of(settings)
    chosen = choose_rate(group, tuned)
    if settings["phase"] != "final" or settings["learning_rate"] != chosen or settings["seed"] not in group.seeds:
        raise ValueError(
            f"the test part may be judged at the chosen learning rate {chosen} by the seeds {group.seeds}, not at "
            f"{settings['learning_rate']} in phase {settings['phase']!r} with seed {settings['seed']}"
        )


def run_cell(settings: Settings, tuned: Sequence[Record] = (), folder: str | None = None) -> Record:
    """Train and judge; the record to keep. A cell of phase "final" needs the records that chose its learning rate.

    Raises:
        ValueError: a final cell at a learning rate that was not chosen; nothing has been trained then.
    """
    from . import training
    from .tasks import test_part, training_parts

    if settings["phase"] == "final":
        check_may_test(settings, tuned)
    group = group_of(settings)
    started = time.monotonic()
    with training.scratch_folder(folder) as output:
        trainer = training.make_trainer(
            group.task, group.method, group.optimizer, group.steps, group.samples, settings["learning_rate"],
            settings["seed"], output,
        )  # fmt: skip
        went = training.train(trainer)
        record = {
            "id": identity(settings),
            "settings": settings,
            **went,
            "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "validation": training.measure(trainer, training_parts(group.task)[1]),
        }
        if settings["phase"] == "final":
            record["test"] = training.measure(trainer, test_part(group.task))
    return record | {"total_seconds": round(time.monotonic() - started, 2), "versions": training.versions()}
