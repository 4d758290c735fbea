"""The section "ways" of the benchmark has every plan, beside the frozen GEMM, and marks the one that is picked."""

import pytest
import torch

pytest.importorskip("triton")

from bench import ways
from bench.cases import Case
from bench.results import Results
from bench.runner import Run


@pytest.fixture
def run(device):
    gathered = Results(None, {"commit": "c", "device": "made up"})
    return Run(torch.device(device), gathered, lambda *_: None, rounds=3)


def test_every_plan_has_a_time(run):
    # S inside needs a rank of eights on a GPU.
    products = dict(ways._measure(run, Case(8, 32, 16, 8, "float16", "float16")))
    assert tuple(products) == ways.STEPS
    for step, rows in products.items():
        assert {row["status"] for row in rows.values()} == {"ok"}
        assert rows["frozen"]["time"]["median_ms"] > 0 and not rows["frozen"]["picked"]
        assert sum(row["picked"] for row in rows.values()) == 1
        words = " ".join(rows)
        if step == "y with C":
            assert set(rows) == {"frozen", "C on the way forward", "C by itself"}
            continue
        if step == "backward":
            assert set(rows) == {"frozen", "dS and u by a pass of their own"}
            continue
        assert ("S inside" in words) == (step == "y") and "vendor" in words and "descriptors" in words


def test_a_wrong_plan_has_none(run, monkeypatch):
    monkeypatch.setattr(ways, "rejected", lambda product, options: {next(iter(options)): "an error of 3"})
    for _, rows in ways._measure(run, Case(8, 24, 16, 4, "float16", "float16")):
        wrong = [row for row in rows.values() if row["status"] == "wrong"]
        assert len(wrong) == 1 and wrong[0]["reason"] == "an error of 3"


def test_a_product_that_fails_does_not_stop_the_run(run, monkeypatch):
    monkeypatch.setattr(ways, "plans_of", lambda *_, **__: 1 / 0)
    failed = [rows["frozen"]["status"] for _, rows in ways._measure(run, Case(8, 24, 16, 4))]
    assert failed == ["failed", "failed", "ok", "ok"]


def test_the_section_goes_over_its_grid_and_leaves_what_no_time_is_for(run, monkeypatch):
    monkeypatch.setattr(Run, "on_gpu", True)
    monkeypatch.setattr(ways, "grid", lambda: [Case(8, 24, 16, 4, "float16", "float16"), Case(16, 24, 16, 4)])
    monkeypatch.setattr(
        ways, "_measure", lambda run, case: [(step, {"frozen": {"status": "ok"}}) for step in ways.STEPS]
    )
    ways.run_ways(run)
    assert [record["case"]["product"] for record in run.results.data["records"]] == [*ways.STEPS] * 2
    run.deadline = 0.0
    run.results.data["records"].clear()
    ways.run_ways(run)
    assert len(run.results.data["not_run"]["ways"]) == 2 and not run.results.data["records"]
