"""Fine-tuning as one call: ``from allora_kernels.training import FinetuneConfig, finetune``."""

from typing import Any

from .config import FinetuneConfig

__all__ = ["FinetuneConfig", "finetune"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the command line asks for the settings alone.
    if name == "finetune":
        from .run import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
