"""The application of deploy/ray: one command starts replicas, requests reach all of them, more requests start more."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("ray.serve", reason="ray is not installed: deploy/ray is NOT tested; pip install 'dspark[ray]'")
ROOT = Path(__file__).resolve().parents[2]
READY = 300  # s


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def replicas(pair, **settings):
    """A Ray of its own with the application on it; yields a client of its proxy."""
    port = free_port()
    given = {"target": pair.target, "drafter": pair.drafter, "name": "tiny"} | settings
    code = (
        "import ray, sys; from ray import serve; sys.path.insert(0, 'deploy/ray'); import app;"
        f"ray.init(num_cpus=2, include_dashboard=False); serve.start(http_options={{'port': {port}}});"
        "serve.run(app.build(dict(pair.split('=', 1) for pair in sys.argv[1:]))); print('ready', flush=True);"
        "sys.stdin.read(); serve.shutdown(); ray.shutdown()"
    )
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, *(f"{name}={value}" for name, value in given.items())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready"):
                    break
            else:
                raise AssertionError("".join(said)[-3000:])
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or the pipe fills
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                yield http
        finally:
            process.stdin.close()
            process.wait(120)


def served(http, tries=24):
    """Tokens written by each replica that answered, by when its process started."""
    found = Counter()
    for _ in range(tries):
        text = http.get("/metrics").text
        found[re.search(r"^process_start_time_seconds (.*)$", text, re.M)[1]] = float(
            re.search(r"^dspark_generation_tokens_total (.*)$", text, re.M)[1]
        )
    return found


def ask(http, count, tokens=16):
    """`count` requests at once, every second one streamed; how many were answered whole."""
    done = []

    def one(number):
        body = {"prompt": "def add", "max_tokens": tokens, "ignore_eos": True, "stream": number % 2 == 0}
        answer = http.post("/v1/completions", json=body)
        whole = answer.text.endswith("data: [DONE]\n\n") if body["stream"] else answer.json()["usage"]
        done.append(answer.status_code == 200 and bool(whole))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def test_two_replicas_share_the_requests(tiny_pair):
    with replicas(tiny_pair, least=2, most=2, cpus=0.5) as http:
        assert http.get("/ready").json() == {"status": "ready"}
        assert ask(http, 24) == 24
        tokens = served(http)
        assert len(tokens) == 2 and sum(tokens.values()) == 24 * 16 and min(tokens.values()) > 0
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}).status_code == 400


def test_more_requests_start_another_replica(tiny_pair):
    with replicas(tiny_pair, least=1, most=2, ongoing=1, cpus=0.5, running=4) as http:
        assert len(served(http, tries=4)) == 1
        ends = time.monotonic() + READY
        while len(served(http, tries=8)) == 1 and time.monotonic() < ends:
            assert ask(http, 8, tokens=200) == 8
        assert len(served(http)) == 2
