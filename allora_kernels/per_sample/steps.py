"""Which module has the per-sample steps of a backend."""

from types import ModuleType

from ..groups.linear import GroupedSteps
from . import grouped_reference, reference


def sample_steps(backend: str | GroupedSteps) -> ModuleType:
    """The module whose functions are the per-sample steps of a backend, or of groups on it: in plain torch, or on Triton
    (loaded on first use)."""
    grouped = isinstance(backend, GroupedSteps)
    if (backend.backend if grouped else backend) == "eager":
        return grouped_reference if grouped else reference
    from . import grouped_ops, ops

    return grouped_ops if grouped else ops
