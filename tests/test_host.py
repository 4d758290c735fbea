"""What a call costs the host, by Triton's own launcher and a driver that does nothing."""

import json
import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher needs a C compiler")
def test_a_replayed_step_is_cheaper(tmp_path):
    command = [sys.executable, "-m", "bench.host", "--rounds", "20", "--output", str(tmp_path / "host.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    us = json.loads((tmp_path / "host.json").read_text())["us"]
    assert set(us) == {"frozen", "peft", "ours", "ours, no call replayed"}
    for what in ("forward", "forward_backward"):
        assert 0 < us["ours"][what] < us["ours, no call replayed"][what]
        assert us["frozen"][what] < us["peft"][what]
