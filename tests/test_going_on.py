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

@pytest.fixture
def breaks():
    yield
    assert False

def test_fails_at_its_end(breaks):
    pass

@pytest.mark.skip
def test_is_skipped():
    pass
"""


def run(folder: Path, *options: str, status: int = 1) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "going_on", "-p", "no:cacheprovider", "tests", *options]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    return done.stdout + done.stderr


def write(folder: Path, tests: str) -> None:
    (folder / "tests").mkdir()
    (folder / "tests" / "test_some.py").write_text(tests)


def test_what_has_passed_is_left_out(tmp_path):
    write(tmp_path, TESTS)
    (tmp_path / "earlier.txt").write_text(
        "A heading.\n1f 2p tests/test_some.py::test_passes[a b]\n1p 2f tests/test_some.py::test_fails\n"
    )
    found = run(tmp_path, "--unless-in", "earlier.txt", "--passed-to", "passed.txt", "-n", "2")
    assert "1 failed, 2 passed, 1 skipped, 1 error" in found
    assert (tmp_path / "passed.txt").read_text() == "tests/test_some.py::test_passes[c::d]\n"
    found = run(tmp_path, "--unless-in", "earlier.txt", "--unless-in", "passed.txt")
    assert "1 failed, 1 passed, 1 skipped, 2 deselected, 1 error" in found


def test_where_all_has_passed_there_is_nothing_to_do(tmp_path):
    write(tmp_path, "def test_passes():\n    pass\n")
    (tmp_path / "passed.txt").touch()
    for expected in ("1 passed", "1 deselected"):
        assert expected in run(tmp_path, "--unless-in", "passed.txt", "--passed-to", "passed.txt", status=0)


def test_a_file_that_is_not_there_is_said_to_be(tmp_path):
    write(tmp_path, TESTS)
    assert "--unless-in: [Errno 2]" in run(tmp_path, "--unless-in", "absent.txt", status=4)
