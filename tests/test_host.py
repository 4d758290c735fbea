"""What a call costs the host, by Triton's own launcher and a driver that does nothing."""

import json
import shutil
import subprocess
import sys

import pytest

# Calls of functions are counted for time, which on a busy machine says little.
COUNTED = """
import sys
from allora_kernels.tools.timing import Timing
from bench import host

def calls_of(step):
    for _ in range(2):
        step()
    seen = 0
    def see(frame, event, of):
        nonlocal seen
        seen += event in ("call", "c_call")
    sys.setprofile(see)
    step()
    sys.setprofile(None)
    return Timing(seen, 0.0, 0.0, 1)

host.dispatch = lambda calls, rounds: {name: calls_of(step) for name, step in calls.items()}
host.main(sys.argv[1:])
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")
def test_a_replayed_step_is_cheaper(tmp_path):
    command = [sys.executable, "-c", COUNTED, "--output", str(tmp_path / "host.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    us = json.loads((tmp_path / "host.json").read_text())["us"]
    assert set(us) == {"frozen", "peft", "ours", "ours, no call replayed"}
    for what in ("forward", "forward_backward"):
        assert 0 < us["ours"][what] < 0.7 * us["ours, no call replayed"][what]
        assert us["frozen"][what] < us["peft"][what]
