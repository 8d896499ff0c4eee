"""The scripts that break a server, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from redis_server import running_redis

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "server_faults.py"


def told_by(tiny_pair, fault, *options):
    pair = ["--target", str(tiny_pair.target), "--drafter", str(tiny_pair.drafter), "--short"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), fault, *options, *pair], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("fault", "options"),
    [("crash", ["--requests", "24"]), ("soak", ["--requests", "60"]), ("fuzz", ["--requests", "80"])],
)
def test_promises_are_kept(tiny_pair, fault, options):
    told = told_by(tiny_pair, fault, *options)
    assert told["kept"] and told["requests"] == int(options[1])
    if fault == "crash":
        assert told["answered_before_the_kill"] >= 12 and told["generated_after_it"] > 0
    if fault == "soak":
        assert told["left"] == 20 and told["whole"] == 40


def test_another_server_at_the_same_redis_takes_over(tiny_pair, tmp_path):
    with running_redis(tmp_path) as url:
        told = told_by(tiny_pair, "failover", "--requests", "24", "--redis", url)
    assert told["kept"] and told["answered_by_the_killed"] > 0 and told["made_by_the_other"] > 0
