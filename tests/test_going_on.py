"""A run of tests goes on where an earlier one has ended."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a b", "c::d"])
def test_passes(name):
    pass

def test_fails():
    assert False

@pytest.mark.skip
def test_is_skipped():
    pass
"""


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "going_on", "-p", "no:cacheprovider", "tests", *options]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


def test_what_has_passed_is_left_out(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "earlier.txt").write_text("A heading.\n1p 2f tests/test_some.py::test_passes[a b]\n")
    found = run(tmp_path, "--unless-in", "earlier.txt", "--passed-to", "passed.txt", "-n", "2")
    assert "1 failed, 1 passed, 1 skipped" in found
    assert (tmp_path / "passed.txt").read_text() == "tests/test_some.py::test_passes[c::d]\n"
    assert "1 failed, 1 skipped, 2 deselected" in run(
        tmp_path, "--unless-in", "earlier.txt", "--unless-in", "passed.txt"
    )
