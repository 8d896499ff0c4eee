"""The scripts that break a server, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "server_faults.py"


@pytest.mark.parametrize(
    ("fault", "options"),
    [("crash", ["--requests", "24"]), ("soak", ["--requests", "60"]), ("fuzz", ["--requests", "80"])],
)
def test_promises_are_kept(tiny_pair, fault, options):
    pair = ["--target", str(tiny_pair.target), "--drafter", str(tiny_pair.drafter), "--short"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), fault, *options, *pair], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["kept"] and told["requests"] == int(options[1])
    if fault == "crash":
        assert told["answered_before_the_kill"] >= 12 and told["generated_after_it"] > 0
    if fault == "soak":
        assert told["left"] == 20 and told["whole"] == 40
