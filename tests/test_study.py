"""The study's cells: each is counted once, validation chooses a learning rate, and the test part is for what was chosen."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from rich.console import Console
from study_cells import fake_record, fill, tiny_task

from bench.study import __main__ as command
from bench.study import cells, methods, plan, runner, tasks
from bench.study.cells import Group, choose_rate, identity
from bench.study.store import Store

QUIET = Console(quiet=True)


@pytest.fixture
def group(tmp_path, monkeypatch):
    task = tiny_task(tmp_path, monkeypatch)
    monkeypatch.setitem(methods.RATES, "adamw", (1e-3, 1e-2, 3e-2))
    monkeypatch.setattr(cells, "SEEDS", (1, 2))
    return Group(task, methods.LORA, "adamw", 3)


def run_here(blocks, store, monkeypatch, execute=runner.run_any, workers=1, **limits):
    """The runner with its worker in this thread."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, *a, **k: ThreadPoolExecutor(workers))
    return runner.run(blocks, store, workers, 1, console=QUIET, execute=execute, **limits)


def tuned(group, accuracies, losses=None):
    """Records of the tuning cells with these validation results."""
    records = []
    for settings, accuracy, loss in zip(group.tuning(), accuracies, losses or [0.5] * len(accuracies)):
        found = {"loss_mean": loss, "accuracy": accuracy}
        records.append(fake_record(settings) | {"validation": found})
    return records


# --- identity -------------------------------------------------------------------------------------------------------


def test_any_changed_setting_is_another_cell(group):
    settings = group.settings("tune", 1e-3, 0)
    assert identity(settings) == identity(json.loads(json.dumps(settings)))
    others = [
        group.settings("final", 1e-3, 0),
        group.settings("tune", 1e-2, 0),
        group.settings("tune", 1e-3, 1),
        Group(group.task, methods.DORA, "adamw", 3).settings("tune", 1e-3, 0),
        Group(group.task, methods.LORA_2, "adamw", 3).settings("tune", 1e-3, 0),
        Group(group.task, methods.LORA, "sgd", 3).settings("tune", 1e-3, 0),
        Group(group.task, methods.LORA, "adamw", 4).settings("tune", 1e-3, 0),
        Group(group.task, methods.LORA, "adamw", 3, 32).settings("tune", 1e-3, 0),
        settings | {"loop": {**settings["loop"], "schedule": "cosine"}},
        *(
            Group(replace(group.task, **changed), methods.LORA, "adamw", 3).settings("tune", 1e-3, 0)
            for changed in ({"max_length": 8}, {"batch_size": 4}, {"validation": 8}, {"test": 8}, {"model": "other"})
        ),
        *(
            Group(group.task, replace(methods.LORA, **changed), "adamw", 3).settings("tune", 1e-3, 0)
            for changed in ({"alpha": 2.0}, {"dropout": 0.1}, {"norm": "row"}, {"eta_squared": 4}, {"side": "A"})
        ),
    ]
    assert len({identity(s) for s in [settings, *others]}) == 1 + len(others)


def test_a_cell_of_other_settings_than_the_study_has_is_not_run(group):
    settings = group.settings("tune", 1e-3, 0)
    with pytest.raises(ValueError, match="other settings of its task, method or optimizer"):
        cells.run_cell(settings | {"optimizer": {**settings["optimizer"], "weight_decay": 0.1}})
    with pytest.raises(ValueError, match="which this study does not have"):
        cells.run_cell(settings | {"method": {"name": "LoRA-XXL"}})


# --- choosing a learning rate ---------------------------------------------------------------------------------------


def test_the_best_validation_metric_chooses_the_rate(group):
    assert choose_rate(group, tuned(group, [0.6, 0.9, 0.7])) == 1e-2
    # The test part has no say.
    records = [r | {"test": {"accuracy": 1.0 - r["validation"]["accuracy"]}} for r in tuned(group, [0.6, 0.9, 0.7])]
    assert choose_rate(group, records) == 1e-2


def test_of_equal_rates_the_lower_loss_is_chosen(group):
    assert choose_rate(group, tuned(group, [0.9, 0.9, 0.7], [0.5, 0.4, 0.1])) == 1e-2
    assert choose_rate(group, tuned(group, [0.9, 0.9, 0.7], [0.3, 0.4, 0.1])) == 1e-3


def test_lower_perplexity_is_better(group, tmp_path, monkeypatch):
    language = Group(tiny_task(tmp_path / "lm", monkeypatch, "causal-lm"), methods.LORA, "adamw", 3)
    found = [{"loss_mean": math.log(p), "perplexity": p} for p in (30.0, 20.0, 25.0)]
    records = [fake_record(s) | {"validation": v} for s, v in zip(language.tuning(), found)]
    assert choose_rate(language, records) == 1e-2


def test_rates_that_diverged_are_not_chosen(group):
    records = tuned(group, [0.6, 0.9, 0.7])
    records[1]["diverged"] = True
    assert choose_rate(group, records) == 3e-2
    records[2]["validation"]["loss_mean"] = None
    assert choose_rate(group, records) == 1e-3
    records[2]["validation"]["loss_mean"] = math.nan
    assert choose_rate(group, records) == 1e-3
    records[0]["diverged"] = True
    assert choose_rate(group, records) is None


def test_nothing_is_chosen_before_all_rates_were_tried(group):
    with pytest.raises(ValueError, match=r"\[0.03\] have not been tried"):
        choose_rate(group, tuned(group, [0.6, 0.9, 0.7])[:2])


# --- the test part --------------------------------------------------------------------------------------------------


def test_the_test_part_is_read_for_the_chosen_rate_alone(group, monkeypatch):
    touched = []
    whole = tasks.test_part
    monkeypatch.setattr(tasks, "test_part", lambda task: touched.append(task) or whole(task))
    records = tuned(group, [0.6, 0.9, 0.7])
    tuning = cells.run_cell(group.settings("tune", 1e-2, 0))
    assert "test" not in tuning and not touched
    for settings, known in (
        (group.settings("final", 1e-3, 1), records),
        (group.settings("final", 1e-2, 0), records),
        (group.settings("final", 1e-2, 1), records[:2]),
        (group.settings("final", 1e-2, 1), []),
    ):
        with pytest.raises(ValueError, match="learning rate"):
            cells.run_cell(settings, known)
    assert not touched
    final = cells.run_cell(group.settings("final", 1e-2, 1), records)
    assert touched == [group.task] and 0 <= final["test"]["accuracy"] <= 1


def test_a_tuning_record_that_saw_the_test_part_is_refused(group, tmp_path):
    store = Store(tmp_path / "results")
    record = fake_record(group.tuning()[0])
    with pytest.raises(ValueError, match="has seen the test part"):
        store.add(record | {"test": record["validation"]})
    assert not store.records and not store.file.exists()


def test_the_parts_of_a_task_have_no_row_in_common(group):
    train, validation = tasks.training_parts(group.task)
    test = tasks.test_part(group.task)
    assert (len(validation), len(test)) == (24, 16) and len(train) == 120 - 24 - 24


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_does_each_cell_once_and_the_next_nothing(group, tmp_path, monkeypatch):
    blocks, store = [plan.Block("tiny", "Tiny", (group, group))], Store(tmp_path / "results")
    assert run_here(blocks, store, monkeypatch)
    lines = [json.loads(line) for line in store.file.read_text().splitlines()]
    assert [r["settings"]["phase"] for r in lines] == ["tune"] * 3 + ["final"] * 2
    assert len({r["id"] for r in lines}) == 5 and ["test" in r for r in lines] == [False] * 3 + [True] * 2
    assert all(r["loss"][1] > 0 and r["trainable"] > 0 and "torch" in r["versions"] for r in lines)
    before = store.file.read_bytes()
    assert run_here(blocks, Store(tmp_path / "results"), monkeypatch)
    assert store.file.read_bytes() == before
    log = (tmp_path / "results" / "cells.log").read_text()
    assert log.count("begin") == log.count("end ") == 5 and "test accuracy" in log


def test_several_workers_do_each_cell_once(group, tmp_path, monkeypatch):
    store, begun = Store(tmp_path / "results"), []

    def slow(settings, records):
        begun.append(identity(settings))
        time.sleep(0.02 * settings["seed"])
        return fake_record(settings)

    blocks = [plan.Block("one", "One", (group, group)), plan.Block("two", "Two", (group,))]
    assert run_here(blocks, store, monkeypatch, slow, workers=3)
    assert len(begun) == len(set(begun)) == 5 and len(store.records) == 5


def test_a_run_that_is_stopped_goes_on_where_it_was(group, tmp_path, monkeypatch):
    blocks, folder = [plan.Block("tiny", "Tiny", (group,))], tmp_path / "results"
    done = []

    def interrupted(settings, records):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(settings)
        return fake_record(settings)

    monkeypatch.setattr(runner, "_stop", lambda pool: pool.shutdown(wait=False))
    assert not run_here(blocks, Store(folder), monkeypatch, interrupted)
    assert len(Store(folder).records) == 3
    again = []
    assert run_here(blocks, Store(folder), monkeypatch, lambda s, records: again.append(s) or fake_record(s))
    assert [s["phase"] for s in again] == ["final"] * 2 and len(Store(folder).records) == 5


def test_a_failing_cell_ends_the_run_and_keeps_the_others(group, tmp_path, monkeypatch):
    def failing(settings, records):
        if settings["learning_rate"] == 1e-2:
            raise RuntimeError("no memory")
        return fake_record(settings)

    monkeypatch.setattr(runner, "_stop", lambda pool: pool.shutdown(wait=False))
    store = Store(tmp_path / "results")
    with pytest.raises(RuntimeError, match="no memory"):
        run_here([plan.Block("tiny", "Tiny", (group,))], store, monkeypatch, failing)
    assert len(Store(tmp_path / "results").records) == 1


def test_no_cell_begins_after_the_time(group, tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    blocks = [plan.Block("tiny", "Tiny", (group,))]
    assert not run_here(blocks, store, monkeypatch, lambda s, records: fake_record(s), minutes=0.0)
    assert not store.records


@pytest.mark.slow
def test_a_run_in_worker_processes(group, tmp_path):
    # A worker does not know this test's task, so one of the study's own is asked for, by a function that trains nothing.
    store = Store(tmp_path / "results")
    blocks = [plan.Block("some", "Some", runs=tuple(plan.quick()[1].runs[:2]))]
    assert runner.run(blocks, store, 2, 1, console=QUIET, execute=fake_in_worker)
    assert len(store.records) == 2


@pytest.mark.slow
def test_a_worker_ends_with_the_run_that_started_it():
    code = """
    import os, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from bench.study.runner import prepare_worker
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare_worker, initargs=(1,))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=command.ROOT, stdout=subprocess.PIPE, timeout=120
    )
    worker, deadline = int(ended.stdout), time.monotonic() + 20
    # stdout is at its end only when the worker, which has it too, is gone.
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(worker, 0)
            time.sleep(0.2)


def fake_in_worker(settings, records):
    return fake_record(settings)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_record_is_counted_once(group, tmp_path):
    store = Store(tmp_path)
    record = fake_record(group.tuning()[0])
    store.add(record)
    with pytest.raises(ValueError, match="counted already"):
        store.add(record)
    assert len(store.file.read_text().splitlines()) == 1
    (tmp_path / "more.jsonl").write_text(store.file.read_text())
    with pytest.raises(ValueError, match=r"more\.jsonl, line 1: cell .* is there twice"):
        Store(tmp_path)


def test_lines_that_are_no_records_are_named(group, tmp_path):
    store = Store(tmp_path)
    store.add(fake_record(group.tuning()[0]))
    good = store.file.read_text()
    store.file.write_text(good + good[:40])
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 2 is not a cell"):
        Store(tmp_path)
    store.file.write_text(good.replace('"seed": 0', '"seed": 7'))
    with pytest.raises(ValueError, match="line 1: the settings do not give the id"):
        Store(tmp_path)


def test_a_line_that_could_not_be_written_whole_leaves_no_trace(group, tmp_path, monkeypatch):
    from bench.study import store as module

    store = Store(tmp_path)
    first, second = (fake_record(s) for s in group.tuning()[:2])
    store.add(first)
    write = module.os.write
    monkeypatch.setattr(module.os, "write", lambda fd, line: write(fd, line[:10]))
    with pytest.raises(OSError, match="could not be written"):
        store.add(second)
    monkeypatch.undo()
    assert list(Store(tmp_path).records) == [first["id"]] == list(store.records)


def test_numbers_that_json_does_not_have_are_none(group, tmp_path):
    store = Store(tmp_path)
    store.add(fake_record(group.tuning()[0]) | {"loss": [1.0, math.inf], "diverged": True})
    assert Store(tmp_path)[group.tuning()[0]]["loss"] == [1.0, None]


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    with first.locked(), pytest.raises(ValueError, match="another run is writing"), second.locked():
        pass
    with second.locked():
        pass


# --- the plan and the command ---------------------------------------------------------------------------------------


def test_the_plan_has_what_the_study_promises():
    groups = [group for block in plan.full() for group in block.groups]
    assert {g.steps for g in groups} == {25, 100, 400} and {g.samples for g in groups} == {None, 32, 256}
    assert {g.optimizer for g in groups} == {"adamw", "sgd"} and {g.task.name for g in groups} == set(tasks.TASKS)
    assert {g.method.name for g in groups} == set(methods.METHODS)
    assert all(len(rates) >= 5 for rates in methods.RATES.values()) and len(cells.SEEDS) >= 5
    assert not set(cells.SEEDS) & set(cells.TUNING_SEEDS)
    rules = {(g.method.norm, g.method.eta_squared) for g in groups if g.method.kind == "allora"}
    assert rules == {(norm, eta) for norm in ("row", "matrix", "factor", "entry", "token") for eta in (1, 2, 4)}


def test_the_quick_plan_has_cells_of_the_full_one(tmp_path):
    quick, full = (fill(Store(tmp_path), blocks).records for blocks in (plan.quick(), plan.full()))
    trained = {i for i, r in quick.items() if r["settings"]["kind"] == "train"}
    assert trained and trained <= set(full)


def test_counts_add_up(group, tmp_path):
    block, store = plan.Block("tiny", "Tiny", (group,)), Store(tmp_path)
    assert plan.counts(block, store) == (0, 5)
    fill(store, [block])
    assert plan.counts(block, store) == (5, 5)
    broken = [r | {"diverged": True} for r in tuned(group, [0.6, 0.9, 0.7])]
    store.records = {r["id"]: r for r in broken}
    assert plan.counts(block, store) == (3, 3) and not plan.ready([block], store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
    ],
)
def test_options_that_make_no_sense_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def said(arguments, tmp_path):
    with (tmp_path / "said").open("w") as file:
        code = command.main(arguments, Console(file=file, width=200))
    return code, (tmp_path / "said").read_text()


def test_an_unknown_block_is_named(tmp_path):
    code, text = said(["--only", "everything", "--results", str(tmp_path)], tmp_path)
    assert code == 2 and "no block is called everything; there are short, main" in text


def test_some_tasks_of_a_block_can_be_asked_for(tmp_path):
    code, text = said(
        ["--list", "--only", "main", "flaws", "--tasks", "reuters-r52", "--results", str(tmp_path)], tmp_path
    )
    assert code == 0 and "0 of   88 cells" in text and "0 of    0 cells" in text
    code, text = said(["--tasks", "reuters", "--results", str(tmp_path)], tmp_path)
    assert code == 2 and "no task is called reuters; there are rotten-tomatoes, election-tweets" in text


def test_a_broken_file_of_results_is_a_line_and_not_a_traceback(tmp_path):
    (tmp_path / "cells.jsonl").write_text("{}\n")
    code, text = said(["--report", "--results", str(tmp_path)], tmp_path)
    assert code == 2 and "line 1 is not a cell of this study" in text


def test_the_list_shows_what_is_there(tmp_path):
    code, text = said(["--list", "--quick", "--results", str(tmp_path)], tmp_path)
    assert code == 0 and " 0 of   55 cells" in text


def test_quick_keeps_out_of_the_committed_results():
    options = command.parse(["--quick"])
    assert options.results == command.QUICK and options.page == command.QUICK / "study.md"
    options = command.parse([])
    assert options.results == command.RESULTS and options.page == command.PAGE
