"""What the runs of the three flaws say, in numbers."""

import math
from collections.abc import Iterable

from .flaws import PLACES
from .plan import Block
from .store import Store

STEPS = (1, 5, 25, 100, 400)
Points = dict[tuple[str, str], list[tuple[float, float, float]]]


def records_of(kind: str, blocks: Iterable[Block], store: Store) -> list[dict]:
    """The records of one kind of flaw, in the plan's order, without runs that diverged."""
    runs = [settings for block in blocks for settings in block.runs if settings["kind"] == kind and settings in store]
    return [store[settings] for settings in runs if not store[settings]["diverged"]]


def scaling_points(records: Iterable[dict]) -> Points:
    """By (method, optimizer): (multiplier, change, interaction), where the run to compare with and all places are there.

    The change is ‖Δ‖/‖logits‖, Δ the logits with the multiplier in all layers minus those without; the interaction is the part
    of Δ that the lower and the upper half do not add up to, ‖Δ_all − Δ_lower − Δ_upper‖ / ‖Δ_all‖.
    """
    logits: dict[tuple[str, str], dict[tuple[float, str], list[float]]] = {}
    for record in records:
        s = record["settings"]
        flat = [value for row in record["logits"] for value in row]
        if all(value is not None for value in flat):
            logits.setdefault((s["method"]["name"], s["optimizer"]["name"]), {})[s["multiplier"], s["place"]] = flat
    points: Points = {}
    for key, found in logits.items():
        base = found.get((1.0, "all"))
        multipliers = sorted({m for m, _ in found if m != 1 and all((m, place) in found for place in PLACES)})
        if base and multipliers:
            points[key] = [(m, *_change(base, *(found[m, place] for place in PLACES))) for m in multipliers]
    return points


def _change(base: list[float], everywhere: list[float], lower: list[float], upper: list[float]) -> tuple[float, float]:
    delta = [a - b for a, b in zip(everywhere, base)]
    apart = [d - (lo - b) - (up - b) for d, lo, up, b in zip(delta, lower, upper, base)]
    size = math.hypot(*delta)
    return size / math.hypot(*base), math.hypot(*apart) / size if size else 0.0


def final_norms(records: Iterable[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """By optimizer and method: the last ‖B‖ and α/r ‖BA‖, mean over the seeds."""
    ends: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        s = record["settings"]
        by_method = ends.setdefault(s["optimizer"]["name"], {})
        by_method.setdefault(s["method"]["name"], []).append((record["B"][-1], record["BA"][-1]))
    return {
        optimizer: {name: tuple(sum(column) / len(column) for column in zip(*pairs)) for name, pairs in found.items()}
        for optimizer, found in ends.items()
    }
