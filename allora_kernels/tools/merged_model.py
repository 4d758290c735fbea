"""`allora merge`: base model and adapter as one ordinary model folder."""

import json
from pathlib import Path
from typing import Any

from ..models.adapted import AdaptReport
from ..models.adapter_config import read_config
from ..models.adapter_files import CONFIG_FILE, adapter_file
from ..models.loading import load_adapter
from ..models.merging import merge_adapter
from ..models.whole_folder import whole_folder
from ..training.base_model import load_base
from ..training.run_folder import BASE_CONFIG_FILE

_TASKS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}


def write_merged_model(adapter: str, output: str, model: str | None = None) -> AdaptReport:
    """Write the base model with the adapter merged into its weights, and the tokenizer, into a new folder.

    Args:
        adapter: folder of an adapter that `finetune`, `save_adapter` or PEFT saved for classification or a causal
            language model.
        output: the folder to make; it appears only when it is whole.
        model: folder or name of the base model; None for the one that the adapter names.

    Returns:
        AdaptReport: what was merged.

    Raises:
        ValueError: `output` exists; the adapter is for another task, names no base model or cannot be loaded; the base model
            cannot be loaded or does not fit.
        FileNotFoundError: there is no adapter in the folder.
        OSError: the output folder cannot be written.
    """
    folder, target = Path(adapter).expanduser(), Path(output).expanduser()
    if target.exists():
        raise ValueError(f"output must be a new folder, but {target} exists")
    read_config(folder)
    file = adapter_file(folder, CONFIG_FILE)
    settings, beside = json.loads(file.read_text(encoding="utf-8")), _base_config(folder)
    task = _TASKS.get(settings.get("task_type"), _task_of(beside))
    if task is None:
        raise ValueError(f"{file}: task_type must be one of {', '.join(_TASKS)}, got {settings.get('task_type')!r}")
    source = model or settings.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{file} names no base model: name it with --model")
    classes = _classes(beside)
    base = load_base(source, task, classes, "auto")
    if classes is not None:
        # The head is the adapter's, whatever order the base model has the same classes in.
        base.model.config.id2label = dict(enumerate(classes))
        base.model.config.label2id = {name: i for i, name in enumerate(classes)}
    report = load_adapter(base.model, folder)
    if untrained := set(base.heads) - set(report.modules_to_save):
        raise ValueError(f"{sorted(untrained)} would be at random values: neither the model nor the adapter has them")
    merge_adapter(base.model)

    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target, f".{target.name}-") as aside:
        base.model.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
    return report


def _base_config(folder: Path) -> dict[str, Any]:
    """What `finetune` left beside the adapter, `{}` where another saved it."""
    file = folder / BASE_CONFIG_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _task_of(base_config: dict[str, Any]) -> str | None:
    """The task of a model whose head PEFT would not look for, so that the adapter's config has none."""
    (architecture,) = base_config.get("architectures", [""])
    return "classification" if architecture.endswith("ForSequenceClassification") else None


def _classes(base_config: dict[str, Any]) -> list[str] | None:
    names = base_config.get("id2label")
    return names and [names[key] for key in sorted(names, key=int)]
