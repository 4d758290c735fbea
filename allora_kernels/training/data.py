"""Text files and data sets of the hub, read strictly and turned into token ids."""

import codecs
import csv
import hashlib
import io
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Texts:
    """Documents in the order they were read, and a label for each (None where the task has none)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """SHA-256 of texts and labels, as hex digits."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


def looks_like_a_path(name: str) -> bool:
    """Whether `name`, which is on no disk here, was meant as a path and not as a name on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (*SUFFIXES, ".json")


def read_texts(source: str, text_column: str, label_column: str | None) -> Texts:
    """Read a CSV, TSV, JSON Lines or plain text file in UTF-8, or the ``train`` split of a data set of the hub.

    CSV and TSV need a header; JSON Lines an object a line; a .txt file is one document. Labels are kept as strings.

    Args:
        source: path of the file, or name of the data set.
        text_column: column (key) of the text.
        label_column: column (key) of the label; None to read none.

    Raises:
        ValueError: no such file; an unknown file type; not UTF-8; nothing in it; a column, text or label missing, or a column
            there twice; a label that is neither a string nor an integer.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if looks_like_a_path(source):
            raise ValueError(f"no such data file: {source}")
        rows, columns, where = _hub_rows(source)
    elif not path.is_file():
        raise ValueError(f"data must be a file, but {source} is a folder; files end in {', '.join(SUFFIXES)}")
    elif path.suffix == ".txt":
        return _plain_text(path, label_column)
    elif path.suffix in (".csv", ".tsv"):
        rows, columns = _csv_rows(path)
        where = str(path)
    elif path.suffix == ".jsonl":
        rows, columns, where = _jsonl_rows(path), None, str(path)
    else:
        raise ValueError(f"{source} must end in one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}")
    return _collect(rows, columns, where, text_column, label_column)


def hold_out(data: Texts, fraction: float, seed: int) -> tuple[Texts, Texts]:
    """Split into (training, evaluation): a random `fraction` of the documents, the same for the same `seed`.

    A single document without a label is cut near its end, after a line, so that what is evaluated comes after all that is
    trained on.

    Raises:
        ValueError: too little text for both sides.
    """
    if len(data) == 1 and data.labels is None:
        (text,) = data.texts
        cut = text.rfind("\n", 0, round(len(text) * (1 - fraction))) + 1
        if cut == 0:
            raise ValueError("the text has too few lines to hold some out for evaluation: give --eval-data")
        return Texts((text[:cut],)), Texts((text[cut:],))
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    count = max(1, round(len(data) * fraction))
    if count == len(data):
        raise ValueError(
            f"eval_fraction {fraction:g} of {len(data)} texts leaves none to train on: lower it, or give --eval-data"
        )

    def take(indices: Sequence[int]) -> Texts:
        labels = None if data.labels is None else tuple(data.labels[i] for i in indices)
        return Texts(tuple(data.texts[i] for i in indices), labels)

    return take(order[count:]), take(order[:count])


def label_names(train: Texts, evaluation: Texts) -> list[str]:
    """The classes in `train`: by number where all are integers, else by alphabet.

    Raises:
        ValueError: fewer than two classes, or one in `evaluation` that `train` does not have.
    """
    names = set(train.labels)
    if len(names) < 2:
        raise ValueError(
            f"classification needs at least two labels to train on, but all {len(train)} are {train.labels[0]!r}, without the "
            f"{len(evaluation)} to evaluate on"
        )
    if unseen := sorted(set(evaluation.labels) - names):
        raise ValueError(f"the evaluation data has labels that the training data does not have: {unseen}")
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int if numeric else None)


# --- token ids ------------------------------------------------------------------------------------------------------


def classification_dataset(
    data: Texts, names: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> "Dataset":
    """A row a document: ``input_ids``, ``attention_mask`` (both cut at `max_length` tokens) and ``labels``."""
    index = {name: i for i, name in enumerate(names)}

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, return_token_type_ids=False)
        return {**encoded, "labels": [index[label] for label in batch["label"]]}

    return _map({"text": data.texts, "label": data.labels}, encode)


def check_tokens(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> None:
    """ValueError where there is nothing to learn from: fewer than two tokens that the tokenizer knows, special ones aside. One
    made from no files, as transformers hands out without a word, knows none."""
    special, known = set(tokenizer.all_special_ids), set()
    for ids in dataset["input_ids"]:
        known.update(set(ids) - special)
        if len(known) > 1:
            return
    raise ValueError(
        f"{tokenizer.name_or_path} has no tokenizer for the training data, of which it knows {len(known)} tokens, special ones "
        "aside: the folder needs the model's tokenizer files, such as tokenizer.json"
    )


def by_length(dataset: "Dataset") -> "Dataset":
    """The same rows, shortest first: batches of it have little padding."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def causal_lm_dataset(data: Texts, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "Dataset":
    """Blocks of `max_length` tokens: the documents one after another, each ended by the end-of-text token.

    All blocks are whole, so that the mean over them is the mean over tokens; what is left over at the end is dropped,
    except where it is all there is.

    Raises:
        ValueError: fewer than two tokens.
    """
    import numpy as np

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list]) -> dict[str, list]:
        # verbose=False: a document longer than the model's context is the normal case here, not worth a warning.
        return {"ids": tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]}

    rows = _map({"text": data.texts}, encode)["ids"]
    ids = np.concatenate([np.asarray([*row, *end], dtype=np.int64) for row in rows])
    if len(ids) < 2:
        raise ValueError(f"a language model needs at least two tokens of text, got {len(ids)}")
    size = min(max_length, len(ids))
    blocks = ids[: len(ids) // size * size].reshape(-1, size)
    return _dataset({"input_ids": blocks, "labels": blocks})


def _dataset(columns: dict[str, Sequence]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


def _map(columns: dict[str, Sequence], encode) -> "Dataset":
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # A fingerprint of our own, because hashing the tokenizer takes longer than to run it.
        return _dataset(columns).map(
            encode, batched=True, remove_columns=list(columns), keep_in_memory=True, new_fingerprint="tokens"
        )
    finally:
        if not bars:
            datasets.enable_progress_bars()


# --- reading --------------------------------------------------------------------------------------------------------

_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate alone, which JSON can write and no tokenizer reads."""

Row = tuple[str, dict[str, Any]]
"""Where the row stands, in words, and its values by column."""


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        encoding = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{byte:02x} at offset {error.start}): convert it, for example with "
            f"iconv -f {encoding} -t utf-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _plain_text(path: Path, label_column: str | None) -> Texts:
    if label_column is not None:
        raise ValueError(f"classification needs labels, and plain text has none: make {path.name} a .csv or .jsonl")
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return Texts((text,))


def _csv_rows(path: Path) -> tuple[Iterator[Row], list[str]]:
    # The default limit of 128 KiB a field is less than a long document.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_decode(path)), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header = next(reader, None)
    if not header:
        raise ValueError(f"{path} is empty: its first line must name the columns")

    def rows() -> Iterator[Row]:
        try:
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if not values:
                    continue
                if len(values) != len(header):
                    raise ValueError(f"{where}: {len(values)} fields, but the header names {len(header)}")
                yield where, dict(zip(header, values))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None

    return rows(), header


class _Repeated(ValueError):
    """A key that is there twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(repr(key))
        found[key] = value
    return found


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        except _Repeated as error:
            raise ValueError(f"{where} has the key {error} twice: rename or remove one") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")
        yield where, row


def _hub_rows(name: str) -> tuple[Iterator[Row], list[str], str]:
    import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:
        # Whatever goes wrong here (no such name, no network, no train split) is about the name that was given.
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is neither a file here nor a data set that could be loaded: {reason}") from error
    names = {c: f.names for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}

    def rows() -> Iterator[Row]:
        for i, row in enumerate(data):
            # A set without labels, as the test split of a competition, has -1 or None for them.
            known = {c: names[c][v] if v is not None and v >= 0 else None for c, v in row.items() if c in names}
            yield f"{name}, row {i}", {**row, **known}

    return rows(), data.column_names, name


def _collect(
    rows: Iterator[Row], columns: list[str] | None, where: str, text_column: str, label_column: str | None
) -> Texts:
    texts, labels = [], []
    if columns is not None:
        _check_columns(columns, where, text_column, label_column)
    for place, row in rows:
        _check_columns(list(row), place, text_column, label_column)
        text = row[text_column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: {text_column!r} must be some text, got {text!r}")
        if (half := _HALF_A_CHARACTER.search(text)) is not None:
            raise ValueError(
                f"{place}: {text_column!r} has half of a character, {half[0]!r} at {half.start()}, as where a text was cut: "
                "remove it"
            )
        texts.append(text)
        if label_column is not None:
            labels.append(_label(row[label_column], place, label_column))
    if not texts:
        raise ValueError(f"{where} is empty: there is no row in it")
    return Texts(tuple(texts), None if label_column is None else tuple(labels))


def _check_columns(columns: list[str], where: str, text_column: str, label_column: str | None) -> None:
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column is not None and column not in columns:
            raise ValueError(f"{where} has no column {column!r}; it has {columns}: name one with {option}")
        if columns.count(column) > 1:
            raise ValueError(
                f"{where} has the column {column!r} {columns.count(column)} times: rename or remove the others"
            )


def _label(value: Any, where: str, column: str) -> str:
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value)
    raise ValueError(f"{where}: {column!r} must be a label (a string or an integer), got {value!r}")
