"""The model under the adapters: loading it, and what it needs before training."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from .config import FinetuneConfig
from .data import looks_like_a_path


class Base(NamedTuple):
    """A model that has everything but its head from a checkpoint."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    classes: list[str] | None
    """Names in the order of the model's outputs; None for a language model."""
    heads: list[str]
    """Modules to train whole: the classification head, and a pooler that the checkpoint does not have."""


def model_source(name: str) -> tuple[str, dict[str, bool]]:
    """What `from_pretrained` is to be called with for a model's folder, which needs no network, or name on the hub.

    Raises:
        ValueError: there is no such folder, or no model in it.
    """
    path = Path(name).expanduser()
    if not path.exists() and looks_like_a_path(name):
        raise ValueError(f"no such model folder: {name}")
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is not a transformers model: it must be a folder with a config.json")
    return (str(path), {"local_files_only": True}) if path.exists() else (name, {})


def load_base(
    name: str, task: str, classes: Sequence[str] | None, dtype: torch.dtype | str, quantize: str | None = None
) -> Base:
    """Load a transformers model and its tokenizer; from a folder, without asking the network.

    Args:
        name: the folder, or the name on the hub.
        task: ``"classification"`` or ``"causal-lm"``.
        classes: names of the classes, reordered where the model's own are the same; None for those the model has.
        dtype: of the weights, or what quantized ones compute in; ``"auto"`` for the checkpoint's.
        quantize: ``"4bit"`` or ``"8bit"``: store the linear layers so, but for the heads, on the process's own device; None: as
            the checkpoint is.

    Raises:
        ValueError: there is no such model, it is not one for the task, or its tokenizer belongs to another; bitsandbytes is not
            installed, or the checkpoint is quantized already.
    """
    source, where = model_source(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        if task == "classification":
            kind = transformers.AutoModelForSequenceClassification
            classes = _describe_classes(config, classes)
            config.pad_token_id = _pad_token_id(tokenizer)
        else:
            kind = transformers.AutoModelForCausalLM
            if _sees_ahead(config):
                raise ValueError("it is a masked language model, which sees the words it would have to predict")
        if quantize is not None:
            where = where | _quantization(quantize, task, kind, config, dtype)
        model, info = kind.from_pretrained(
            source, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **where
        )
        heads = _heads(model, info) if task == "classification" else []
        _check_complete(info, heads)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} cannot be loaded for {task}: {reason}") from error
    _check_vocabulary(model, tokenizer)
    return Base(model, tokenizer, classes, heads)


def _quantization(
    quantize: str, task: str, kind: type, config: transformers.PretrainedConfig, dtype: torch.dtype
) -> dict:
    """What `kind.from_pretrained` is to be called with, too."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes: pip install '.[quantized]' in a checkout of allora-kernels")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is quantized already: leave quantize out")
    settings = {"load_in_8bit": True}
    if quantize == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    if task == "classification":
        # Heads are trained, and a pooler may turn out to be one.
        with torch.device("meta"):
            empty = kind.from_config(config)
        poolers = [name for name, _ in empty.named_modules() if name.endswith(".pooler")]
        settings["llm_int8_skip_modules"] = [*_own_parts(empty), *poolers]
    quantized = {"quantization_config": transformers.BitsAndBytesConfig(**settings)}
    device = PartialState().device
    if device.type == "cuda":
        # The one that the Trainer takes; left to itself, transformers loads it on the first GPU in every process.
        quantized["device_map"] = {"": device.index or 0}
    return quantized


def _sees_ahead(config: transformers.PretrainedConfig) -> bool:
    """Whether in a language model of `config` a token sees those after it: an encoder that is not told to be a decoder."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return False
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING


def _describe_classes(config: transformers.PretrainedConfig, classes: Sequence[str] | None) -> list[str]:
    if classes is None:
        return [config.id2label[i] for i in range(config.num_labels)]
    if set(config.label2id) == set(classes):
        # The model was trained for these classes: its head knows them in its own order.
        classes = sorted(classes, key=config.label2id.__getitem__)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    return list(classes)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("its tokenizer has neither a padding nor an end token, and a batch of texts needs one")
    return tokenizer.pad_token_id


def _heads(model: nn.Module, info: dict) -> list[str]:
    poolers = {key.rpartition(".")[0] for key in info["missing_keys"] if ".pooler." in key}
    return [*_own_parts(model), *sorted(poolers)]


def _own_parts(model: nn.Module) -> list[str]:
    """The children of `model` with parameters that are not its base model."""
    children = model.named_children()
    return [n for n, c in children if n != model.base_model_prefix and any(True for _ in c.parameters())]


def _check_complete(info: dict, heads: list[str]) -> None:
    """ValueError if anything but a head was left at random values, which transformers only warns of."""
    # A mismatched key comes with both shapes, a missing one alone.
    keys = [key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])]
    lacking = sorted(key for key in keys if not key.startswith(tuple(f"{head}." for head in heads)))
    if lacking:
        raise ValueError(f"the checkpoint lacks {len(lacking)} of the model's weights, first {lacking[0]}")


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {rows}: they do not belong together"
        )


def length_limit(config: FinetuneConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text or block: what was asked for, else 512 or where the model ends.

    Raises:
        ValueError: more was asked for than the model takes.
    """
    limit = tokenizer.model_max_length
    # XLNet, which has no end, says -1.
    if (positions := getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0) > 0:
        limit = min(limit, positions - _reserved_positions(model))
    if config.max_length is None:
        return min(512, limit)
    if config.max_length > limit:
        raise ValueError(f"max_length must be <= {limit}, where {config.model} ends, got {config.max_length}")
    return config.max_length


def _reserved_positions(model: nn.Module) -> int:
    """Rows of the position embeddings that no token of a text has: RoBERTa and its kin count from behind the padding's."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = (getattr(table, "padding_idx", None) for table in tables)
    return max((index + 1 for index in padding if index is not None), default=0)


def computes_in_bf16(config: FinetuneConfig) -> bool:
    """What was asked for, else whether there is a GPU that has bfloat16."""
    if config.bf16 is None:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.bf16


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on transformers' gradient checkpointing, by whichever of its two names this version has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # The reentrant kind gives no gradients where a checkpointed layer's input needs none, as behind frozen embeddings.
    enable({"use_reentrant": False})
