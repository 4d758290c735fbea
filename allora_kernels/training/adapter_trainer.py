"""Trainers whose checkpoints hold the adapters in the model's place."""

import os

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..layer.adapter import ALLoRALayer
from ..models.adapted import adapter_layers, adapter_names, adapter_parameters
from ..models.loading import load_adapter
from ..models.names import unwrap
from ..models.saving import save_adapter
from ..models.sharded import any_in_pieces
from .parallel import RequireParallel, prepare_anew


class AdapterCheckpoints:
    """Put it before any subclass of transformers' Trainer: ``class Mine(AdapterCheckpoints, SFTTrainer): pass``.

    Checkpoints, and what `save_model` writes, then hold the adapters and modules saved whole of a model from `apply_allora`, in
    PEFT's format, with the tokenizer, the optimizer and the rest of what Trainer keeps, but not the base model.
    ``resume_from_checkpoint`` and ``load_best_model_at_end`` read them. `evaluate` may come before `train` in several
    processes too.

    Raises:
        ValueError: the model has no adapters, or several and `adapter` is None; or accelerate's FSDP or DeepSpeed plugin is on:
            they write checkpoints of their own, with the whole model; or a trainer of TRL would pass by an adapter on the
            output head, has put PEFT's adapters over the model, or syncs a reference model.
    """

    base_model_name_or_path: str | None = None
    """For adapter_config.json; None for the name that the model carries."""
    adapter: str | None = None
    """Whose checkpoints these are, where the model has several adapters."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not adapter_layers(unwrap(self.model)):
            raise ValueError("the model has no adapters: apply_allora(model) before the trainer gets it")
        if self.adapter is None and len(names := adapter_names(unwrap(self.model))) > 1:
            raise ValueError(
                f"the model has adapters {', '.join(map(repr, names))}, and a checkpoint holds one: set `adapter` of the "
                "trainer's class to the one it trains, and call set_adapter before train"
            )
        self._check_head()
        self._check_unwrapped()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"{engine} is on, which writes checkpoints of its own with the whole model: use the trainer without "
                "AdapterCheckpoints, and save_adapter at the end"
            )

    def _check_head(self) -> None:
        of_trl = any(cls.__module__.partition(".")[0] == "trl" for cls in type(self).__mro__)
        head = getattr(unwrap(self.model), "get_output_embeddings", lambda: None)()
        if of_trl and isinstance(head, ALLoRALayer):
            name = next(name for name, module in unwrap(self.model).named_modules() if module is head)
            raise ValueError(
                f"{name} has an adapter, and TRL computes its loss from the frozen weight of that layer, past the adapter, "
                "which would not be trained: leave the head out of target_modules"
            )

    def _check_unwrapped(self) -> None:
        tuner = next((m for m in unwrap(self.model).modules() if type(m).__module__.startswith("peft.tuners.")), None)
        if tuner is not None:
            raise ValueError(
                f"PEFT's {type(tuner).__name__} is around the adapted model, so that its adapters are trained and not "
                "ALLoRA's: leave peft_config out"
            )
        if getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model copies the model's parameters to a reference model of the same ones, and an adapted model has "
                "more: the frozen base model is the reference (sync_ref_model=False)"
            )

    def train(self, *args, **kwargs):
        """As in Trainer; RuntimeError before the first step where several processes would each train a model of their own."""
        prepare_anew(self)
        guard = RequireParallel(self)
        self.add_callback(guard)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.remove_callback(guard)

    def save_adapters(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """The adapters alone, from the process that writes, or all where they are sharded."""
        sharded = state_dict is None and any_in_pieces(self.model, adapter_parameters)
        if self.args.should_save or sharded:
            save_adapter(
                self.model,
                output_dir,
                adapter=self.adapter,
                base_model_name_or_path=self.base_model_name_or_path,
                state_dict=state_dict,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        self.save_adapters(output_dir, state_dict)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint, adapter=self.adapter)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint, adapter=self.adapter)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """transformers' Trainer with `AdapterCheckpoints`."""
