"""Which module has the per-sample steps of a backend."""

from types import ModuleType
from typing import Any

from . import grouped_reference, reference


def sample_steps(backend: Any) -> ModuleType:
    """The module whose functions are the per-sample steps: of a layer on a backend, by its name, or of groups, by their
    `GroupedSteps`; in plain torch, or on Triton (loaded on first use)."""
    grouped = not isinstance(backend, str)
    if (backend.backend if grouped else backend) == "eager":
        return grouped_reference if grouped else reference
    from . import grouped_ops, ops

    return grouped_ops if grouped else ops
