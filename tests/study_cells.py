"""A tiny task for the study's tests, and records made up for a whole plan."""

import random
from pathlib import Path

from tiny_training import make_model, sentences

from bench.study import cells, data, methods, plan, tasks
from bench.study.store import Store

VERSIONS = {"python": "3", "torch": "2"}


def tiny_task(tmp_path: Path, monkeypatch, kind: str = "classification") -> tasks.Task:
    """A random model, and texts in which one word gives the label away."""
    family = "Bert" if kind == "classification" else "Llama"
    folder = make_model(tmp_path / family, family)
    rows = sentences(120)
    if kind == "causal-lm":
        rows = [(" ".join(text for text, _ in rows[i::12]), "") for i in range(12)]
    task = tasks.Task(f"tiny-{tmp_path}", "Tiny", kind, folder, 16, 8, validation=24, test=16)
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    monkeypatch.setitem(
        tasks._READERS, task.name, lambda: data.Texts(rows[4 if kind == "causal-lm" else 24 :], rows[:24])
    )
    for module in (tasks, methods):
        monkeypatch.setattr(module, "model_folder", lambda model: model)
    return task


def fake_record(settings: cells.Settings, better: str | None = None) -> cells.Record:
    """A record with made-up numbers, the same for the same settings; the method called `better` is better than the rest."""
    generator = random.Random(cells.identity(settings))
    lead = 0.1 if settings["method"]["name"] == better else 0.0
    if settings["task"]["kind"] == "causal-lm":
        measured = {"loss_mean": 3.0 + 0.1 * generator.random(), "perplexity": 20 + generator.random() - 50 * lead}
    else:
        measured = {"loss_mean": 0.5 + 0.1 * generator.random(), "accuracy": 0.7 + 0.05 * generator.random() + lead}
    record = {
        "id": cells.identity(settings), "settings": settings, "seconds": 1.0, "loss": [1.0, 0.5], "diverged": False,
        "validation": measured, "total_seconds": 2.0, "versions": VERSIONS,
    }  # fmt: skip
    if settings["kind"] == "dropout":
        record["differences"] = [generator.gauss(0.01, 0.03) for _ in range(settings["masks"])]
    elif settings["kind"] == "norms":
        grow = [0.01 * step * (2 if settings["method"]["kind"] == "allora" else 1) for step in range(settings["steps"])]
        record |= {"B": grow, "BA": grow}
    elif settings["kind"] == "scaling":
        record["logits"] = [[generator.gauss(0, 1), generator.gauss(0, 1)] for _ in range(8)]
    elif settings["phase"] == "final":
        record["test"] = dict(measured)
    return record


def fill(store: Store, blocks: list[plan.Block], better: str | None = None) -> Store:
    """Everything the plan asks for, made up, in memory."""
    while todo := plan.ready(blocks, store):
        store.records |= {cells.identity(settings): fake_record(settings, better) for settings, _ in todo}
    return store
