"""What a call costs the host, by Triton's own launcher and a driver that does nothing."""

import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")
def test_a_replayed_step_is_cheaper():
    done = subprocess.run([sys.executable, "-m", "bench.host", "--rounds", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = {name: int(step) for name, step in re.findall(r"^(\S.*?) +\d+ +(\d+)$", done.stdout, re.MULTILINE)}
    assert set(steps) == {"frozen layer", "peft", "allora", "allora, no call replayed"}
    assert 0 < steps["allora"] < steps["allora, no call replayed"]
