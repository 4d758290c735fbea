"""Reading text: what comes in, what is refused, and what the tokens look like."""

import copy
import json

import pytest

from allora_kernels.training import data
from allora_kernels.training.data import Texts, hold_out, label_names, read_texts

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_csv_with_quotes_newlines_bom_and_blank_lines(file):
    source = file("d.csv", '\ufefflabel,text\r\n1,"a, ""b""\r\nc"\r\n\r\n0,d\u2028e\r\n')
    assert read_texts(source, "text", "label") == Texts(('a, "b"\nc', "d\u2028e"), ("1", "0"))


def test_tsv(file):
    assert read_texts(file("d.tsv", "text\tlabel\na, b\tx\n"), "text", "label") == Texts(("a, b",), ("x",))


def test_a_field_longer_than_the_csv_modules_limit(file):
    (text,) = read_texts(file("d.csv", "text\n" + "a" * 200_000 + "\n"), "text", None).texts
    assert len(text) == 200_000


def test_jsonl_with_integer_labels_and_other_keys(file):
    lines = [json.dumps({"body": "é\u2028", "y": 1, "more": None}), "", json.dumps({"body": "b", "y": "no"})]
    assert read_texts(file("d.jsonl", "\n".join(lines)), "body", "y") == Texts(("é\u2028", "b"), ("1", "no"))


def test_plain_text_is_one_document(file):
    assert read_texts(file("d.txt", "one\n\ntwo\n"), "text", None) == Texts(("one\n\ntwo\n",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", r"d\.csv is empty: its first line must name the columns"),
        ("d.csv", "text,label\n", r"d\.csv is empty: there is no row"),
        ("d.csv", "text,class\na,b\n", r"no column 'label'; it has \['text', 'class'\].*--label-column"),
        ("d.csv", "body,label\na,b\n", r"no column 'text'.*--text-column"),
        ("d.csv", "text,label\na,b\nc\n", r"line 3: 1 fields, but the header names 2"),
        ("d.csv", "text,label\na,\n", r"line 2: 'label' must be a label .* got ''"),
        ("d.csv", "text,label\n ,b\n", r"line 2: 'text' must be some text, got ' '"),
        ("d.csv", 'text,label\n"a,b\n', r"d\.csv, line 2: unexpected end of data"),
        ("d.csv", "text,label\ncafé,b\n".encode("latin1"), r"not UTF-8 \(byte 0xe9 at offset 14\).*iconv"),
        ("d.jsonl", "", r"d\.jsonl is empty"),
        ("d.jsonl", '{"text": "a"}\n', r"line 1 has no column 'label'"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{', r"line 2 is not JSON"),
        ("d.jsonl", "[1]\n", r"line 1 must be a JSON object, got list"),
        ("d.jsonl", '{"text": "a", "label": 0.5}\n', r"a string or an integer\), got 0\.5"),
        ("d.jsonl", '{"text": 3, "label": 1}\n', r"must be some text, got 3"),
        ("d.csv", "text,label,text\na,b,c\n", r"d\.csv has the column 'text' 2 times: rename or remove the others"),
        ("d.csv", "text,label,label\na,b,c\n", r"has the column 'label' 2 times"),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), r"not UTF-8 \(byte 0x.. at offset 0\).*iconv -f utf-16"),
        ("d.jsonl", '{"text": "a", "label": 1, "text": "b"}\n', r"line 1 has the key 'text' twice"),
        ("d.jsonl", '{"text": "ab\\ud83d", "label": 1}\n', r"line 1: 'text' has half of a character, '\\ud83d' at 2"),
        ("d.txt", "words", r"plain text has none: make d\.txt a \.csv or \.jsonl"),
        ("d.parquet", "x", r"must end in one of .*\.csv.* got '\.parquet'"),
    ],
)
def test_bad_files_are_refused_by_name(file, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_texts(file(name, content), "text", "label")


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no such data file: missing\.csv"):
        read_texts("missing.csv", "text", None)
    with pytest.raises(ValueError, match="is a folder"):
        read_texts(str(tmp_path), "text", None)


def test_an_empty_plain_text(file):
    with pytest.raises(ValueError, match="is empty"):
        read_texts(file("d.txt", " \n"), "text", None)


def test_columns_that_nobody_reads_may_have_one_name(file):
    assert read_texts(file("d.csv", "text,,\na,1,2\n"), "text", None) == Texts(("a",))
    assert read_texts(file("d.jsonl", '{"text": "\\ud83d\\ude00", "more": {}}\n'), "text", None) == Texts(
        ("\U0001f600",)
    )


@pytest.mark.parametrize("missing", [-1, None])
def test_a_missing_label_of_the_hub_is_no_class(monkeypatch, missing):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    stored = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, missing]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    with pytest.raises(ValueError, match=r"someone/set, row 1: 'label' must be a label .* got None"):
        read_texts("someone/set", "text", "label")
    assert read_texts("someone/set", "text", None).texts == ("a", "b")


def test_a_name_on_the_hub(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    stored = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    assert read_texts("someone/set", "text", "label") == Texts(("a", "b"), ("yes", "no"))

    def missing(name, split):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match=r"someone/set is neither a file here nor .*: no network$"):
        read_texts("someone/set", "text", "label")


# --- the split ------------------------------------------------------------------------------------------------------


def test_the_split_is_a_partition_and_follows_the_seed():
    rows = Texts(tuple(map(str, range(50))), tuple("ab" * 25))
    train, held = hold_out(rows, 0.2, seed=3)
    assert len(held) == 10 and sorted(train.texts + held.texts) == sorted(rows.texts)
    assert all(label == "ab"[int(text) % 2] for part in (train, held) for text, label in zip(part.texts, part.labels))
    assert hold_out(rows, 0.2, seed=3) == (train, held)
    assert hold_out(rows, 0.2, seed=4) != (train, held)


def test_one_text_is_cut_after_a_line_near_its_end():
    text = "".join(f"line {i}\n" for i in range(100))
    train, held = hold_out(Texts((text,)), 0.1, seed=0)
    assert train.texts[0] + held.texts[0] == text and train.texts[0].endswith("\n")
    assert 5 < held.texts[0].count("\n") < 15
    with pytest.raises(ValueError, match="--eval-data"):
        hold_out(Texts(("one line only",)), 0.5, seed=0)


@pytest.mark.parametrize("texts", [Texts(("a", "b", "c")), Texts(("one\n" * 9,), ("yes",))])
def test_something_is_left_to_train_on(texts):
    with pytest.raises(ValueError, match=rf"eval_fraction 0\.9 of {len(texts)} texts leaves none to train on"):
        hold_out(texts, 0.9, seed=0)


def test_labels_are_ordered_and_checked():
    assert label_names(Texts(("",) * 3, ("10", "9", "10")), Texts((), ())) == ["9", "10"]
    assert label_names(Texts(("",) * 3, ("b", "a", "1")), Texts((), ())) == ["1", "a", "b"]
    with pytest.raises(ValueError, match="two labels to train on, but all 2 are 'a', without the 1 to evaluate on"):
        label_names(Texts(("", ""), ("a", "a")), Texts(("",), ("b",)))
    with pytest.raises(ValueError, match=r"labels that the training data does not have: \['c'\]"):
        label_names(Texts(("", ""), ("a", "b")), Texts(("",), ("c",)))


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tiny_training import make_model

    return transformers.AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model"), "Llama"))


def test_classification_rows_are_cut_and_labelled(tokenizer):
    texts = Texts(("w0 w1 w2 w3", "good"), ("yes", "no"))
    rows = data.classification_dataset(texts, ["no", "yes"], tokenizer, max_length=3)
    assert rows["labels"][:] == [1, 0]
    assert rows["input_ids"][:] == [[3, 4, 5], [tokenizer.convert_tokens_to_ids("good")]]
    assert data.by_length(rows)["labels"][:] == [0, 1]


def test_blocks_hold_the_documents_one_after_another(tokenizer):
    texts = Texts(("w0 w1 w2", "w3", "w4 w5 w6"))
    rows = data.causal_lm_dataset(texts, tokenizer, max_length=4)
    end = tokenizer.eos_token_id
    assert rows["input_ids"][:] == [[3, 4, 5, end], [6, end, 7, 8]]
    assert rows["labels"][:] == rows["input_ids"][:]


def test_less_than_a_block_is_one_short_block(tokenizer):
    assert len(data.causal_lm_dataset(Texts(("w0 w1",)), tokenizer, max_length=30)["input_ids"][0]) == 3
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="at least two tokens of text, got 1"):
        data.causal_lm_dataset(Texts(("w0",)), tokenizer, max_length=30)
