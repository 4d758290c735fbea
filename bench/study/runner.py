"""Runs cells in worker processes; this process alone writes them down."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plan
from .cells import Record, Settings, identity
from .plan import Block
from .store import Store


def run_any(settings: Settings, tuned: list[Record]) -> Record:
    """Run a cell of any kind; called in a worker."""
    from . import cells, flaws

    return cells.run_cell(settings, tuned) if settings["kind"] == "train" else flaws.run_cell(settings)


def prepare_worker(threads: int) -> None:
    """What a worker does first: take `threads` threads, be quiet, and leave Ctrl-C to the process that started it."""
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    # What torch, torchao and PEFT tell about one another would break up the progress bar in each worker.
    logging.disable(logging.WARNING)
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for its next cell for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def describe(settings: Settings) -> str:
    """A cell in a line."""
    samples = "" if settings["samples"] is None else f", {settings['samples']} samples"
    more = "".join(f", {key} {settings[key]}" for key in ("masks", "multiplier", "place") if key in settings)
    return (
        f"{settings.get('phase', settings['kind'])}: {settings['task']['name']}, {settings['method']['name']}, "
        f"{settings['optimizer']['name']}, {settings['steps']} steps{samples}, lr {settings['learning_rate']:g}, "
        f"seed {settings['seed']}{more}"
    )


def outcome(record: Record) -> str:
    """What came of it, in a few words."""
    if record["diverged"]:
        return "diverged"
    parts = {part: record[part] for part in ("validation", "test") if part in record}
    names = ("accuracy", "perplexity")
    return ", ".join(f"{p} {n} {found[n]:.4g}" for p, found in parts.items() for n in names if found.get(n) is not None)


def run(
    blocks: list[Block],
    store: Store,
    workers: int,
    threads: int,
    minutes: float | None = None,
    console: Console | None = None,
    execute: Callable[[Settings, list[Record]], Record] = run_any,
) -> bool:
    """Run what is not there yet, `workers` cells at a time; begin nothing after `minutes`.

    Ctrl-C stops: cells that have ended are kept, those under way are lost and run anew the next time.

    Returns:
        bool: whether all cells are there.

    Raises:
        ValueError: another run writes to the same folder.
    """
    console = console or Console()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with store.locked(), (store.folder / "cells.log").open("a", encoding="utf-8", buffering=1) as log:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_worker, initargs=(threads,))
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        try:
            with Progress(*columns, console=console) as bar:
                bars = {block.name: bar.add_task(f"{block.name:<8}") for block in blocks}
                _fill(blocks, store, pool, workers, deadline, execute, log, lambda: _show(bar, bars, blocks, store))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            _stop(pool)
            return False
        except BaseException:
            _stop(pool)
            raise
        pool.shutdown()
    return not plan.ready(blocks, store)


def _fill(blocks, store, pool, workers, deadline, execute, log, show) -> None:
    """Keep `workers` cells under way, always the first of the plan that can be run."""
    under_way: dict[Future, tuple[Settings, float]] = {}
    show()
    while True:
        begun = {identity(settings) for settings, _ in under_way.values()}
        if deadline is None or time.monotonic() < deadline:
            for settings, tuned in plan.ready(blocks, store):
                if len(under_way) < workers and identity(settings) not in begun:
                    under_way[pool.submit(execute, settings, tuned)] = (settings, time.monotonic())
                    log.write(f"begin {identity(settings)} {describe(settings)}\n")
        if not under_way:
            return
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            settings, start = under_way.pop(future)
            record = future.result()
            store.add(record)
            log.write(f"end   {record['id']} {time.monotonic() - start:.1f} s: {outcome(record)}\n")
        show()


def _show(bar: Progress, bars: dict, blocks: list[Block], store: Store) -> None:
    for block in blocks:
        done, total = plan.counts(block, store)
        bar.update(bars[block.name], completed=done, total=total)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers without waiting for their cells."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
