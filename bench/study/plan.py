"""Which cells the study has, the most informative first."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from . import flaws
from . import methods as m
from .cells import Group, Record, Settings, choose_rate
from .store import Store
from .tasks import TASKS

ENCODER_TASKS = ("election-tweets", "rotten-tomatoes", "reuters-r52", "newsgroups")
FEW_TASKS = ("election-tweets", "reuters-r52")
DECODER_TASKS = ("shakespeare", "rotten-prompt")
ALLORA_1 = m.METHODS["ALLoRA row η²=1"]
COMPARED = (m.LORA, m.ALLORA, m.DORA, m.LORA_PLUS)
"""What runs on every task and budget; these are ranked."""
RIVALS = (m.LORA, m.LORA_2, m.DORA, m.LORA_PLUS)
"""What ALLoRA is compared with, wherever both have run."""


@dataclass(frozen=True)
class Block:
    """A part of the study that answers one question."""

    name: str
    title: str
    groups: tuple[Group, ...] = ()
    runs: tuple[Settings, ...] = field(default=())
    """Cells that stand for themselves: those of the three flaws."""

    def of(self, tasks: Collection[str]) -> "Block":
        """The part of it that is about `tasks`."""
        groups = tuple(group for group in self.groups if group.task.name in tasks)
        return replace(self, groups=groups, runs=tuple(run for run in self.runs if run["task"]["name"] in tasks))


def _groups(tasks, methods, optimizers=("adamw",), steps=(100,), samples=(None,)) -> tuple[Group, ...]:
    return tuple(
        Group(TASKS[task], method, optimizer, count, rows)
        for count in steps
        for rows in samples
        for task in tasks
        for optimizer in optimizers
        for method in methods
    )


def full() -> list[Block]:
    """The whole study."""
    return [
        Block("short", "25 steps, AdamW", _groups(ENCODER_TASKS, (*COMPARED, m.HEAD), steps=(25,))),
        Block("main", "100 steps, AdamW", _groups(ENCODER_TASKS, (*COMPARED, m.HEAD, m.LORA_2, ALLORA_1, m.FULL))),
        Block("flaws", "The three flaws", runs=tuple(flaws.cells())),
        Block("sgd", "100 steps, SGD with momentum", _groups(ENCODER_TASKS, (*COMPARED, m.LORA_2, ALLORA_1), ("sgd",))),
        Block(
            "sides",
            "Where the coefficient is applied, 25 steps",
            _groups(FEW_TASKS, (m.LORA, m.ALLORA, *m.ALLORA_SIDES), ("adamw", "sgd"), (25,)),
        ),
        Block(
            "plus",
            "ALLoRA with LoRA+'s learning rates",
            (
                *_groups(FEW_TASKS, (m.LORA_PLUS, m.ALLORA, m.ALLORA_PLUS), steps=(25, 100)),
                *_groups(FEW_TASKS, (m.LORA_PLUS, m.ALLORA, m.ALLORA_PLUS), ("sgd",)),
            ),
        ),
        Block("rules", "Rules and η², 25 steps", _groups(FEW_TASKS, m.ALLORA_RULES, ("adamw", "sgd"), (25,))),
        Block("samples", "32 and 256 samples, AdamW", _groups(FEW_TASKS, (*COMPARED, m.HEAD), samples=(32, 256))),
        Block("dropout", "Dropout in LoRA, AdamW", _groups(ENCODER_TASKS, (m.LORA_DROPOUT, m.LORA_2_DROPOUT))),
        Block("decoder", "The decoder, 25 steps, AdamW", _groups(DECODER_TASKS, (m.FROZEN, *COMPARED), steps=(25,))),
        Block("long", "400 steps, AdamW", _groups(FEW_TASKS, COMPARED, steps=(400,))),
    ]


def quick() -> list[Block]:
    """A small part of it, with the same settings."""
    return [
        Block("short", "25 steps, AdamW", _groups(("election-tweets",), (*COMPARED, m.HEAD), steps=(25,))),
        Block("flaws", "The three flaws", runs=tuple(flaws.quick_cells())),
    ]


def ready(blocks: list[Block], store: Store) -> list[tuple[Settings, list[Record]]]:
    """The cells that can be run now, in order, each with the records that its learning rate was chosen by."""
    found: dict[str, tuple[Settings, list[Record]]] = {}
    for block in blocks:
        for group in block.groups:
            for settings, tuned in _next_of(group, store):
                found.setdefault(str(settings), (settings, tuned))
        for settings in block.runs:
            if settings not in store:
                found.setdefault(str(settings), (settings, []))
    return list(found.values())


def _next_of(group: Group, store: Store) -> list[tuple[Settings, list[Record]]]:
    open_cells = [settings for settings in group.tuning() if settings not in store]
    if open_cells:
        return [(settings, []) for settings in open_cells]
    tuned = [store[settings] for settings in group.tuning()]
    rate = choose_rate(group, tuned)
    finals = [] if rate is None else group.final(rate)
    return [(settings, tuned) for settings in finals if settings not in store]


def whole(blocks: list[Block]) -> Block:
    """All blocks as one, in which a group that several of them have is once."""
    groups = dict.fromkeys(group for block in blocks for group in block.groups)
    return Block("all", "", tuple(groups), tuple(settings for block in blocks for settings in block.runs))


def counts(block: Block, store: Store) -> tuple[int, int]:
    """(cells that are there, cells of the block). A group whose every learning rate diverged has no more to run."""
    done = total = 0
    for group in block.groups:
        tuned = [store[s] for s in group.tuning() if s in store]
        total += len(group.tuning())
        done += len(tuned)
        rate = choose_rate(group, tuned) if len(tuned) == len(group.tuning()) else None
        if rate is not None:
            done += sum(settings in store for settings in group.final(rate))
        if rate is not None or len(tuned) < len(group.tuning()):
            total += len(group.seeds)
    return done + sum(settings in store for settings in block.runs), total + len(block.runs)
