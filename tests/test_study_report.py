"""The study's page: the same bytes from the same records, statistics as scipy has them, and sentences made by the numbers."""

import math
import re
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from study_cells import fake_record, fill

from bench.study import __main__ as command
from bench.study import flaw_report, plan, readme, report, results, sections, statistics, verdicts
from bench.study.cells import SEEDS, identity
from bench.study.methods import ALLORA, LORA
from bench.study.store import Store

OURS = ALLORA.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with every cell of the plan, made up."""
    return fill(Store(tmp_path_factory.mktemp("none")), plan.full())


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "study.md"
    report.write(whole, plan.full(), file)
    return file


def winner(name, tmp_path):
    """The page of a study in which one method is better than all others."""
    blocks = [block for block in plan.full() if block.name in ("main", "sgd", "decoder")]
    report.write(fill(Store(tmp_path), blocks, better=name), blocks, tmp_path / "study.md")
    return (tmp_path / "study.md").read_text()


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(whole, page, tmp_path):
    again = Store(tmp_path)
    again.records = dict(reversed(whole.records.items()))
    report.write(again, plan.full(), tmp_path / "study.md")
    files = sorted(file.name for file in page.parent.iterdir())
    assert files == sorted(file.name for file in tmp_path.iterdir()) and len(files) == 6
    for name in files:
        assert (tmp_path / name).read_bytes() == (page.parent / name).read_bytes(), name
        assert name.endswith(".md") or b"Software" not in (tmp_path / name).read_bytes()


def test_every_figure_has_its_command_and_every_claim_its_table(page):
    text = page.read_text()
    figures = re.findall(
        r"!\[[^\]]+\]\((study-\w+\.png)\)\n\n\*\*Figure (\d+)\.\*\* [^\n]+\n\n```console\n\$ (.*)\n```", text
    )
    assert [int(number) for _, number, _ in figures] == list(range(1, 6)) and text.count("![") == 5
    names = {block.name for block in plan.full()}
    for file, _, line in figures:
        assert (page.parent / file).exists()
        options = command.parse(line.removeprefix("python -m bench.study").split())
        assert options.only and set(options.only) <= names
    tables = [int(n) for n in re.findall(r"\*\*Table (\d+)\.\*\*", text)]
    # Table 1 is of what has been run, which stands in front of the others.
    assert tables == list(range(1, len(tables) + 1))
    claims = re.findall(r"^- (.*)$", text, re.MULTILINE)
    assert len(claims) > 20
    for claim in claims:
        (kind, numbers), *_ = re.findall(r"(Table|Figure)s? ((?:\d+(?:, )?)+)", claim)
        assert all(int(n) <= (len(tables) if kind == "Table" else 5) for n in numbers.split(", ")), claim


def test_an_incomplete_grid_says_what_is_missing(whole, tmp_path):
    part = Store(tmp_path)
    last = list(whole.records.items())[-1][1]["settings"]
    part.records = {i: r for i, r in whole.records.items() if r["settings"] != last}
    text = report.text(part, plan.full(), tmp_path / "study.md")
    assert (
        "Blocks share cells: 2209 of 2210 are there" in text
        and "The grid is not complete: cells are missing in" in text
    )
    assert "2210 of 2210 are there" in report.text(whole, plan.full(), tmp_path / "study.md")


def test_without_records_there_is_a_page_and_no_claim(tmp_path):
    (tmp_path / "study-old.png").touch()
    report.write(Store(tmp_path), plan.full(), tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "No group of cells is complete yet." in text and "What to choose" not in text
    assert not list(tmp_path.glob("*.png"))


def test_who_wins_decides_what_is_said(tmp_path):
    ours, theirs = (winner(name, tmp_path) for name in (OURS, LORA.name))
    # The decoder's two tasks are under AdamW; of perplexity less is better.
    for optimizer, cases in (("AdamW", 6), ("SGD with momentum", 4)):
        assert f"- Under {optimizer}, {OURS} is better than LoRA in {cases} of {cases} cases (mean +" in ours
        assert f"- Under {optimizer}, {OURS} is worse than LoRA in {cases} of {cases} cases (mean -" in theirs
        assert re.search(rf"under {optimizer}, {OURS} comes first", ours)
        assert re.search(rf"under {optimizer}, LoRA comes first", theirs)
    assert f"{OURS} has the best mean on Election tweets, Rotten Tomatoes" in ours
    assert "LoRA has the best mean on Election tweets, Rotten Tomatoes" in theirs
    assert "16 came out for it, 0 against it" in ours and "0 came out for it, 4 against it" in theirs


def test_what_dropout_does_is_counted_against_the_same_method_without_it(tmp_path):
    blocks = [block for block in plan.full() if block.name in ("main", "dropout")]
    # Without dropout LoRA is better than all, also than LoRA α/r=2 and both with dropout.
    text = report.text(fill(Store(tmp_path), blocks, better=LORA.name), blocks, tmp_path / "study.md")
    assert "Under AdamW, LoRA dropout 0.1 is worse than LoRA in 4 of 4 cases (mean -" in text
    assert "Under AdamW, LoRA α/r=2 dropout 0.1 is not told apart from LoRA α/r=2 (4 cases, " in text
    assert text.count("### What it does to the accuracy") == 1
    alone = [block for block in blocks if block.name == "dropout"]
    assert "What it does to the accuracy" not in report.text(Store(tmp_path), alone, tmp_path / "study.md")


def test_a_verdict_counts_cases_and_leaves_perplexity_out_of_the_points():
    def case(task, points, p, half=1.0, sign=1):
        difference = statistics.Difference(statistics.Mean(points / 100, half / 100), p)
        return results.Budget("adamw", 25, None), results.Comparison(task, "LoRA", difference, p, sign)

    mixed = verdicts.Tally(
        "LoRA",
        [case("newsgroups", 2.0, 0.01), case("reuters-r52", -1.04, 0.02, 3.0), case("shakespeare", -90, 0.01, 90, -1)],
    )
    alone = verdicts.Tally("DoRA", [case("newsgroups", -0.04, 0.5)])
    perplexity = verdicts.Tally("LoRA+", [case("shakespeare", 1.0, 0.9, sign=-1)])
    assert verdicts.sentence("AdamW", [mixed, alone, perplexity]) == (
        f"Under AdamW, {OURS} is better than LoRA in 2 and worse in 1 of 3 cases (mean +0.5 points over the 2 with an "
        "accuracy); not told apart from DoRA (1 case, mean +0.0 points) or LoRA+ (1 case)"
    )
    better = "2: 20 Newsgroups at 25 steps, Shakespeare, decoder at 25 steps"
    assert verdicts.rows("AdamW", [mixed, perplexity]) == [
        ["AdamW", "LoRA", 3, better, "1: Reuters R52 at 25 steps", 0, "+0.5", "±2.0"],
        ["AdamW", "LoRA+", 1, "0", "0", 1, "", ""],
    ]


def test_a_group_is_shown_only_when_all_its_seeds_are_there(whole, tmp_path):
    group = next(g for b in plan.full() for g in b.groups if g.method == LORA)
    part = Store(tmp_path)
    found = results.collect(plan.full(), whole)
    key = next(key for key, result in found.items() if result.group == group)
    part.records = dict(whole.records)
    del part.records[identity(group.final(found[key].rate)[2])]
    assert set(found) - set(results.collect(plan.full(), part)) == {key}


def test_a_rate_at_the_edge_and_a_broken_run_are_marked(tmp_path):
    block = plan.full()[1]
    group = block.groups[0]
    store = Store(tmp_path)
    for settings in group.tuning():
        record = fake_record(settings)
        record["validation"] |= {"accuracy": 1.0 if settings["learning_rate"] == group.rates[-1] else 0.5}
        store.records[record["id"]] = record
    for settings in group.final(group.rates[-1]):
        record = fake_record(settings) | {"diverged": settings["seed"] == SEEDS[0]}
        store.records[record["id"]] = record
    text = report.text(store, [block], tmp_path / "study.md")
    assert f"({group.rates[-1]:g}!), 1 diverged |" in text
    record["test"] = {"loss_mean": None, "accuracy": None}
    assert "| LoRA | diverged |" in report.text(store, [block], tmp_path / "study.md")


def test_a_table_says_where_methods_end_below_the_head_alone(tmp_path):
    block = next(block for block in plan.full() if block.name == "short")
    text = report.text(fill(Store(tmp_path), [block], better="head only"), [block], tmp_path / "study.md")
    assert re.search(
        r"^- On Reuters R52 \d of \d methods end below the head alone, \d\d\.\d% \(Table 3\)\.$", text, re.M
    )
    text = report.text(fill(Store(tmp_path), [block], better=OURS), [block], tmp_path / "study.md")
    assert "0 of" not in text.partition("### AdamW, 25 steps")[2].partition("**Table 4.**")[0]


# --- statistics -----------------------------------------------------------------------------------------------------


def test_intervals_and_paired_tests_are_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.8, 0.02, 5), generator.normal(0.79, 0.02, 5)
    ours, theirs = ({seed: float(x) for seed, x in zip(SEEDS, values)} for values in (a, b))
    found = statistics.paired(ours, dict(reversed(theirs.items())))
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean.value == pytest.approx(np.mean(a - b)) and found.mean.half == pytest.approx((high - low) / 2)
    assert statistics.mean_interval(a).half == pytest.approx(stats.sem(a) * stats.t.ppf(0.975, 4))
    assert math.isnan(statistics.mean_interval([0.5]).half)
    assert statistics.paired(ours, ours) == ((0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="the same two or more seeds"):
        statistics.paired(ours, {1: 0.5, 2: 0.5})


def test_holm_corrects_as_in_the_textbook():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []


def test_ranks_and_the_critical_difference():
    # Demšar (2006), table 5: q = 2.569 for four methods; with 14 data sets the critical difference is 1.25.
    scores = {name: [float(-place)] * 14 for place, name in enumerate("abcd")}
    found = statistics.ranking(scores)
    assert found.ranks == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0} and found.cases == 14
    assert found.critical == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), rel=1e-3) and found.p < 1e-6
    assert statistics.cliques(found) == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert statistics.ranking({name: [0.5] * 3 for name in "abc"}).p == 1.0
    assert statistics.ranking({"a": [1.0, 2.0], "b": [2.0, 1.0]}) is None
    generator = np.random.default_rng(0)
    table = generator.normal(size=(3, 9))
    assert statistics.ranking(dict(zip("abc", table))).p == pytest.approx(stats.friedmanchisquare(*table).pvalue)


def test_means_equal_but_for_the_order_of_their_values_share_a_rank(tmp_path):
    block = plan.full()[1]
    store = fill(Store(tmp_path), [block])
    values = dict(zip(SEEDS, (0.1, 0.2, 0.4, 0.3, 0.5)))
    for record in store.records.values():
        if "test" in record:
            seed = record["settings"]["seed"]
            backwards = record["settings"]["method"]["name"] == OURS
            record["test"]["accuracy"] = values[SEEDS[-1] + SEEDS[0] - seed if backwards else seed]
    found = results.collect([block], store)
    scores = results.rank_scores(found, results.budgets(found), [OURS, LORA.name])
    assert scores[OURS] == scores[LORA.name] == [0.3] * 4


def test_the_spread_of_a_running_mean_narrows_as_a_root():
    values = np.random.default_rng(0).normal(1.0, 2.0, 4000)
    low, high = statistics.running_mean_spread(values, 100)
    assert (high - low) / 2 == pytest.approx(1.96 * 2.0 / 10, rel=0.1) and low < 1.0 < high
    assert statistics.running_mean_spread(values, 100) == (low, high)


def test_halves_that_add_up_do_not_interact():
    def record(multiplier, place, logits):
        settings = {"multiplier": multiplier, "place": place, "method": {"name": "M"}, "optimizer": {"name": "sgd"}}
        return {"settings": settings, "logits": [logits]}

    base, lower, upper = [3.0, 4.0], [4.0, 4.0], [3.0, 6.0]
    added = [record(1.0, "all", base), record(2.0, "lower", lower), record(2.0, "upper", upper)]
    points = flaw_report.scaling_points([*added, record(2.0, "all", [4.0, 6.0])])
    assert points == {("M", "sgd"): [(2.0, pytest.approx(math.sqrt(5) / 5), 0.0)]}
    ((_, _, mixed),) = flaw_report.scaling_points([*added, record(2.0, "all", [5.0, 6.0])])["M", "sgd"]
    assert mixed == pytest.approx(1 / math.sqrt(8))
    assert not flaw_report.scaling_points(added)


def test_one_outlier_is_no_mean_of_the_scaling(monkeypatch):
    changes = {"LoRA": [(0.5, 1.0, 0.2), (4.0, 80.0, 0.3)], OURS: [(0.5, 15.0, 0.5), (4.0, 4.0, 0.1)]}
    points = {(name, "sgd"): found for name, found in changes.items()}
    monkeypatch.setattr(flaw_report, "scaling_points", lambda records: points)
    monkeypatch.setattr(sections.figures, "scaling", lambda points: None)
    numbered, said = SimpleNamespace(figure=lambda *a: "", figures=5), []
    sections.scaling(numbered, [], said)
    assert said == [
        "Under SGD with momentum multiplying ALLoRA's η changes the logits less than multiplying LoRA's α at 1 of 2 "
        "multipliers (by 4.00 to 15.00 against 1.00 to 80.00 of their size), and the layers interact by 0.10 to 0.50 against "
        "0.20 to 0.30 of the change (Figure 5)."
    ]


# --- what is committed ----------------------------------------------------------------------------------------------


def test_the_committed_page_is_the_one_of_the_committed_records(tmp_path):
    report.write(Store(command.RESULTS), plan.full(), tmp_path / "study.md")
    committed = {file.name for file in command.PAGE.parent.glob("study*") if file.suffix in (".md", ".png")}
    assert committed == {file.name for file in tmp_path.iterdir()}
    assert command.PAGE.read_text() == (tmp_path / "study.md").read_text(), "python -m bench.study --report"
    pinned = re.search(r"^matplotlib==(.+)$", (command.ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    for name in committed:
        if name.endswith(".png") and metadata.version("matplotlib") == pinned:
            assert (tmp_path / name).read_bytes() == command.PAGE.with_name(name).read_bytes(), name


def test_the_readme_says_what_the_committed_records_say(tmp_path):
    text = (command.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(text)
    readme.write(Store(command.RESULTS), plan.full(), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text, "python -m bench.study --report"


def test_the_readmes_summary_begins_with_the_answer_that_the_numbers_give(tmp_path):
    blocks = [block for block in plan.full() if block.name in ("main", "sgd")]
    for better, answer, gains, losses in (
        (OURS, "Better than", 16, 0),
        (LORA.name, "Worse than", 0, 4),
        (None, "", 0, 0),
    ):
        store = fill(Store(tmp_path), blocks, better)
        for record in store.records.values():
            if better is None and "test" in record:
                record["test"]["accuracy"] = 0.5
        text = readme.summary(store, blocks)
        assert text.startswith(f"**{answer or 'About as well as'} LoRA, LoRA α/r=2, DoRA and LoRA+")
        assert "of 1 small model and 4 tasks, with 5 seeds" in text and "the grid is complete" in text
        for title in ("AdamW", "SGD with momentum"):
            assert f"Under {title}: 4 cases, 16 comparisons, {gains} gains, {losses} losses." in text
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no <!-- study:begin -->"):
        readme.write(Store(tmp_path), blocks, tmp_path / "README.md")
    assert readme.summary(Store(tmp_path), blocks) == readme.NOT_YET
