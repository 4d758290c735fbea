"""A pytest plugin for runs that have no time for all tests: a later one goes on where an earlier one has ended.

``pytest -m gpu --passed-to FILE`` writes down each test that passes as soon as it does; ``--unless-in FILE`` leaves out those
that FILE names, in lines that may say something else in front.
"""

import re
from pathlib import Path

import pytest

_TEST = re.compile(r"tests/\S+\.py::.*")


def pytest_addoption(parser):
    parser.addoption(
        "--unless-in", metavar="FILE", action="append", default=[], help="leave out the tests that this file names"
    )
    parser.addoption("--passed-to", metavar="FILE", help="append the name of each test that passes")


def pytest_configure(config):
    worker = getattr(config, "workerinput", None)
    # A worker that is started later than others has to leave out the same tests, whatever has passed meanwhile.
    config.passed_before = worker["passed_before"] if worker else _named_in(config.getoption("--unless-in"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["passed_before"] = node.config.passed_before


def pytest_collection_modifyitems(config, items):
    passed = set(config.passed_before)
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in passed]


class _Writer:
    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            with open(self._path, "a") as file:
                file.write(report.nodeid + "\n")


def pytest_sessionstart(session):
    path = session.config.getoption("--passed-to")
    # Of several processes the one that all report to.
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Writer(path))


def _named_in(paths: list[str]) -> list[str]:
    lines = [line for path in paths for line in Path(path).read_text().splitlines()]
    return [found.group() for found in map(_TEST.search, lines) if found]
