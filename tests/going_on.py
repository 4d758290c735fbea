"""A pytest plugin for runs that have no time for all tests: a later one goes on where an earlier one has ended.

``pytest -m gpu --passed-to FILE`` writes down each test that passes as soon as it does; ``--unless-in FILE`` leaves out those
that FILE names. In front of a name there may be marks, of which the last then is one that ends in p, for passed.
"""

import re
from pathlib import Path

import pytest

_TEST = re.compile(r"^(?:.*p )?(tests/\S+\.py::.*)")


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
        config.all_passed_before = not items


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and getattr(session.config, "all_passed_before", False):
        session.exitstatus = pytest.ExitCode.OK


class _Writer:
    def __init__(self, path: str) -> None:
        self._path, self._passed_call = path, set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self._passed_call.add(report.nodeid)
        elif report.when == "teardown" and report.passed and report.nodeid in self._passed_call:
            with open(self._path, "a") as file:
                file.write(report.nodeid + "\n")


def pytest_sessionstart(session):
    path = session.config.getoption("--passed-to")
    # Of several processes the one that all report to.
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Writer(path))


def _named_in(paths: list[str]) -> list[str]:
    try:
        lines = [line for path in paths for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise pytest.UsageError(f"--unless-in: {error}") from None
    return [found.group(1) for found in map(_TEST.match, lines) if found]
