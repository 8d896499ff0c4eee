"""What a streamed request costs the event loop: processor time of the server's loop over a core that computes nothing.

The core sleeps for as long as a step would take and commits a token of a fixed text to every request, so the engine's
thread does what it always does around a step and all the rest is HTTP. `--against SRC` has the server of another
checkout take turns.

    python benchmarks/http_request_cost.py --against OTHER/src
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from http_overhead import check, jobs_of, served

USERS = 32
TEXT = "def area(width, height):\n    return [width * height for _ in range(3)]\n\nclass Shape:\n    '''A shape.'''\n"


class Idle:
    """A core in which time passes and nothing is computed."""

    def __init__(self, core: Any, step_seconds: float):
        self.core, self.step_seconds = core, step_seconds
        self.config, self.requests = core.config, dict[int, Any]()
        self.text = core.intake.tokenize(TEXT * 20)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    @property
    def idle(self) -> bool:
        return not self.requests

    def add(self, prompt: Any, params: Any) -> int:
        request = self.core.intake.request(prompt, params)
        self.requests[request.id] = request
        return request.id

    def cancel(self, request_id: int) -> None:
        self.requests.pop(request_id, None)

    def step(self) -> list[Any]:
        from dspark.engine.request import Commit

        time.sleep(self.step_seconds)
        commits = []
        for request in list(self.requests.values()):
            kept, texts = request.commit(self.text[request.output_length :][:1])
            told = (None, request.finish_reason, request.statistics)
            commits.append(Commit(request.id, kept, "".join(texts), 0, *told))
            if request.finish_reason:
                del self.requests[request.id]
        return commits


def serve(step_seconds: float) -> None:
    """The server process; its address is its first line."""
    from dspark.common.collector import freeze_startup
    from dspark.demo.pair import demo_target_path
    from dspark.engine.build import build_engine
    from dspark.engine.engine import Engine
    from dspark.server.api import create_app
    from dspark.server.launch import address, bind, make_server, run
    from dspark.server.logs import configure

    configure("info", "text")
    core = build_engine(demo_target_path(), None, "none", compile=False, max_running=USERS, pages=2000)
    app = create_app(Engine(Idle(core, step_seconds)))  # type: ignore[arg-type]
    bound = bind("127.0.0.1", 0)
    bound.listen(USERS)
    freeze_startup()
    print(address(bound), flush=True)
    run(make_server(app), bound)
    os._exit(0)


def loop_seconds(pid: int) -> float:
    """Processor time of a process's first thread, on which its event loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    """Milliseconds a request of the loop and of the client, and events a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=5.7, help="what a step takes")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="src of another checkout")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return serve(asked.step_ms / 1000)
    command = [sys.executable, __file__, "--serve", "--step-ms", str(asked.step_ms)]
    sources = {"here": os.environ}
    if asked.against is not None:
        sources["against"] = os.environ | {"PYTHONPATH": str(asked.against)}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    servers = {name: subprocess.Popen(command, env=env, **options) for name, env in sources.items()}
    jobs = jobs_of(asked.requests)
    costs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in servers}
    try:
        ports = {name: int(re.findall(r":(\d+)$", server.stdout.readline())[0]) for name, server in servers.items()}
        for number in range(asked.rounds + 1):  # the first is to warm up
            for name, server in servers.items():
                before = loop_seconds(server.pid)
                _, client, answers = asyncio.run(served("127.0.0.1", ports[name], jobs, USERS))
                spent = loop_seconds(server.pid) - before
                check(answers, jobs)
                if number:
                    events = sum(answer.count(b"data: ") for answer in answers)
                    costs[name].append((1000 * spent / len(jobs), 1000 * client / len(jobs), events / len(jobs)))
    finally:
        for server in servers.values():
            server.terminate()
            server.wait()
    for name, rounds in costs.items():
        loop, client, events = (median(column) for column in zip(*rounds, strict=True))
        print(f"{name:<8}loop {loop:5.2f} ms a request   client {client:5.2f}   {events:4.1f} events a text")


if __name__ == "__main__":
    main()
