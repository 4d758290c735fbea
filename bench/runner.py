"""What the sections of a run share: device, filters, the clock, and where rows go."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import cases
from .cases import Case
from .providers import PROVIDERS
from .results import Results


@dataclass
class Run:
    """One run of the benchmark. `say` prints a finished record: (section, title, rows)."""

    device: torch.device
    results: Results
    say: Callable[[str, str, dict[str, dict]], None]
    providers: list[str] | None = None
    shapes: list[dict[str, int]] = field(default_factory=list)
    only_missing: bool = False
    deadline: float = float("inf")
    rounds: int = 30

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def case_budget_s(self) -> float:
        """Seconds that one interleaved measurement may take, so that one large case does not eat the run."""
        return 4.0 if self.on_gpu else 3.0

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def time_is_up(self) -> bool:
        return self.seconds_left() <= 0

    def providers_for(self, case: Case) -> list[str]:
        """The providers to measure at `case`: the frozen floor always, what compiles for long only where it is asked for
        or the case is worth it."""
        if self.providers is not None:
            return [name for name in PROVIDERS if name == "frozen" or name in self.providers]
        return [name for name in PROVIDERS if not name.startswith("compile") or cases.compiles(case)]

    def record(self, section: str, title: str, case: dict, rows: dict[str, dict]) -> None:
        self.results.add(section, case, rows)
        self.say(section, title, rows)

    def leave(self, section: str, waiting: list[tuple[dict, list[str]]]) -> None:
        self.results.leave(section, waiting)
