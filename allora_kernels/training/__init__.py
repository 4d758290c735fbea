"""Fine-tuning as one call: ``from allora_kernels.training import FinetuneConfig, finetune``, or several
runs over one base model: `finetune_together`; and a Trainer of your own with
checkpoints that hold the adapters alone: `AdapterTrainer`, `AdapterCheckpoints`."""

from typing import Any

from .config import FinetuneConfig

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "FinetuneConfig", "finetune", "finetune_together"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the command line asks for the settings alone.
    if name == "finetune":
        from .run import finetune

        return finetune
    if name == "finetune_together":
        from .together import finetune_together

        return finetune_together
    if name in ("AdapterCheckpoints", "AdapterTrainer"):
        from . import adapter_trainer

        return getattr(adapter_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
