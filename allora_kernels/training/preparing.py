"""What a training run works on: texts read and tokenized, the model loaded and adapted. Nothing is written."""

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..layer.adapter import DEFAULT_ADAPTER
from ..models.adapt import apply_allora
from ..models.adapted import AdaptReport, saved_modules
from .base_model import Base, computes_in_bf16, enable_checkpointing, length_limit, load_base
from .config import FinetuneConfig
from .data import (
    Texts,
    by_length,
    causal_lm_dataset,
    check_tokens,
    classification_dataset,
    hold_out,
    label_names,
    read_texts,
)

if TYPE_CHECKING:
    from datasets import Dataset


class Prepared(NamedTuple):
    """An adapted model and its data, as `prepare` made them."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    names: list[str] | None
    """Of the classes; None for a language model."""
    texts: tuple[Texts, Texts]
    train: "Dataset"
    evaluation: "Dataset"
    max_length: int
    dtype: torch.dtype
    report: AdaptReport

    def described(self) -> dict[str, Any]:
        """The data, as metrics.json has it."""
        described = {
            "train_rows": len(self.train),
            "eval_rows": len(self.evaluation),
            "max_length": self.max_length,
            "fingerprints": [part.fingerprint() for part in self.texts],
        }
        if self.names:
            ((majority, _),) = Counter(self.texts[0].labels).most_common(1)
            share = self.texts[1].labels.count(majority) / len(self.texts[1])
            described |= {"labels": self.names, "majority_label": majority, "majority_accuracy": share}
        return described


def prepare(config: FinetuneConfig) -> Prepared:
    """Read, load, tokenize and adapt.

    Raises:
        ValueError, TypeError: data and model that do not work or do not fit together.
    """
    texts = read(config)
    base = load(config, class_names(config, texts))
    return on_base(config, base, texts, put_adapter(config, base))


def class_names(config: FinetuneConfig, texts: tuple[Texts, Texts]) -> list[str] | None:
    """The classes in the training texts; None for a language model."""
    return label_names(*texts) if config.task == "classification" else None


def load(config: FinetuneConfig, names: list[str] | None) -> Base:
    """The base model, its head drawn from the run's seed."""
    transformers.set_seed(config.seed)
    return load_base(config.model, config.task, names, dtype_of(config), config.quantize)


def dtype_of(config: FinetuneConfig) -> torch.dtype:
    """Of the frozen weights, or what quantized ones compute in."""
    return torch.bfloat16 if computes_in_bf16(config) else torch.float32


def put_adapter(config: FinetuneConfig, base: Base, name: str = DEFAULT_ADAPTER) -> AdaptReport:
    """Put the run's adapter on the base model, in place, and set it up for training."""
    targets = "all-linear" if config.target_modules == ("all-linear",) else list(config.target_modules)
    report = apply_allora(
        base.model,
        config.r,
        config.eta,
        config.norm,
        targets,
        modules_to_save=base.heads or None,
        experts=config.experts,
        adapter_name=name,
    )
    for head in saved_modules(base.model).values():
        # A head in bfloat16 would round small updates away, as the adapters would.
        head.float()
    if config.gradient_checkpointing:
        enable_checkpointing(base.model)
    return report


def on_base(config: FinetuneConfig, base: Base, texts: tuple[Texts, Texts], report: AdaptReport) -> Prepared:
    """What a run works on: `base` with its adapter, and `texts` as token ids."""
    max_length = length_limit(config, base.model, base.tokenizer)
    train, evaluation = (tokenize(part, base.classes, base.tokenizer, max_length) for part in texts)
    check_tokens(train, base.tokenizer)
    return Prepared(
        base.model,
        base.tokenizer,
        base.classes,
        texts,
        train,
        by_length(evaluation),
        max_length,
        dtype_of(config),
        report,
    )


def read(config: FinetuneConfig) -> tuple[Texts, Texts]:
    """The texts to train and to evaluate on."""
    label_column = config.label_column if config.task == "classification" else None
    data = read_texts(config.data, config.text_column, label_column)
    if config.eval_data is not None:
        return data, read_texts(config.eval_data, config.text_column, label_column)
    return hold_out(data, config.eval_fraction, config.seed)


def tokenize(data: Texts, names: list[str] | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> "Dataset":
    """`data` as token ids: a text a row with its label, or for a language model (no `names`) blocks."""
    if names is None:
        return causal_lm_dataset(data, tokenizer, max_length)
    return classification_dataset(data, names, tokenizer, max_length)


def collator(tokenizer: PreTrainedTokenizerBase, names: list[str] | None):
    """What makes a batch of rows of `tokenize`."""
    return transformers.DataCollatorWithPadding(tokenizer) if names else transformers.default_data_collator
