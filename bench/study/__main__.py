"""``python -m bench.study``: run what is missing of the study, then write its page.

Results are JSON lines under ``bench/results/study/``; a cell that is there is not run again, so the command may be stopped by
Ctrl-C and given again. `--quick` takes a small part, in a folder of its own under runs/. `--report` runs nothing.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "study", ROOT / "docs" / "study.md"
QUICK = Path("runs/study-quick")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: options that make no sense, with a line that says which.
    """
    parser = argparse.ArgumentParser("python -m bench.study", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument(
        "--report", action="store_true", help="write the page and its plots from what is there, run nothing"
    )
    parser.add_argument("--only", nargs="+", metavar="BLOCK", help="blocks of the plan to run (--list shows them)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to run of those blocks")
    parser.add_argument("--list", action="store_true", help="show the blocks, and how much of each is there")
    parser.add_argument(
        "--results", type=Path, help="folder of the JSON lines (bench/results/study; quick: runs/study-quick)"
    )
    parser.add_argument(
        "--page", type=Path, help="the page to write, plots beside it (docs/study.md; quick: in --results)"
    )
    parser.add_argument("--workers", type=int, default=2, help="cells at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
    parser.add_argument("--minutes", type=float, help="begin no cell after this long")
    options = parser.parse_args(arguments)
    for name in ("workers", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    options.results = options.results or (QUICK if options.quick else RESULTS)
    options.page = options.page or (options.results / "study.md" if options.results != RESULTS else PAGE)
    return options


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """Run and report; 0 if all cells of the plan that was asked for are there, else 3; 2 for a user's mistake."""
    options = parse(arguments)
    console = console or Console()
    from . import plan, readme, report, runner
    from .store import Store
    from .tasks import TASKS

    blocks = plan.quick() if options.quick else plan.full()
    for what, asked, known in (
        ("block", options.only, [block.name for block in blocks]),
        ("task", options.tasks, TASKS),
    ):
        if unknown := sorted(set(asked or ()) - set(known)):
            console.print(f"no {what} is called {', '.join(unknown)}; there are {', '.join(known)}", markup=False)
            return 2
    chosen = [block for block in blocks if not options.only or block.name in options.only]
    if options.tasks:
        chosen = [block.of(options.tasks) for block in chosen]
    try:
        store = Store(options.results)
        if options.list:
            for block in chosen:
                done, total = plan.counts(block, store)
                console.print(f"{block.name:<8} {done:>4} of {total:>4} cells  {block.title}", highlight=False)
            return 0
        complete = True
        if not options.report:
            complete = runner.run(chosen, store, options.workers, options.threads, options.minutes, console)
        report.write(store, blocks, options.page)
        if options.page == PAGE:
            readme.write(store, blocks, ROOT / "README.md")
    except (ValueError, FileNotFoundError) as error:
        console.print(str(error), markup=False)
        return 2
    console.print(f"results: {options.results}\npage:    {options.page}", highlight=False, soft_wrap=True)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
