"""Which module has the per-sample steps of a backend."""

from types import ModuleType

from . import reference


def sample_steps(name: str) -> ModuleType:
    """The module whose functions are the per-sample steps: `reference`, or those on Triton (loaded on first use)."""
    if name == "eager":
        return reference
    from . import ops

    return ops
