"""What HTTP and streaming cost: the same requests through `dspark serve`, through `Engine`, and by stepping the core.

Two processes with an engine each take turns, so that whatever else the machine does meets all: the server, and this
one, which drives its own engine directly or is the client. The client only notes which bytes came until the load is
over, but it runs on the cores that the server computes on: what it takes is in the server's number, and said beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from dspark.common.collector import freeze_startup
from dspark.common.sampling_params import SamplingParams
from dspark.demo.corpus import held_out_texts
from dspark.demo.domains import listing
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.engine.build import build_engine
from dspark.engine.engine import Engine
from dspark.engine.step import EngineCore

Job = tuple[str, int]  # a prompt, and how many tokens to write
LAG = 0.02  # s


def jobs_of(count: int) -> list[Job]:
    """Beginnings of held-out files, with lengths that leave the batch one by one, 128 tokens on average."""
    texts = [text[:250] for _, text in held_out_texts(listing(demo_target_path()))]
    return [(texts[number % len(texts)], 96 + 13 * number % 64) for number in range(count)]


def params_of(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def direct(core: EngineCore, jobs: list[Job], users: int) -> float:
    """Seconds to step the core through all jobs, `users` at a time."""
    began, left, inside = time.perf_counter(), iter(jobs), 0
    while True:
        while inside < users and (job := next(left, None)) is not None:
            core.add(job[0], params_of(job[1]))
            inside += 1
        if not inside:
            return time.perf_counter() - began
        inside -= sum(commit.finish_reason is not None for commit in core.step())


async def threaded(engine: Engine, jobs: list[Job], users: int) -> float:
    """The same through the asynchronous engine, in one process with its consumers."""
    began, left = time.perf_counter(), iter(jobs)

    async def user() -> None:
        for prompt, tokens in left:
            async for _ in engine.stream(prompt, params_of(tokens)):
                pass

    await asyncio.gather(*(user() for _ in range(users)))
    return time.perf_counter() - began


class User(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, left: Iterator[bytes], done: list[bytes], ended: asyncio.Future[None]):
        self.left, self.done, self.ended = left, done, ended
        self.parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        request = next(self.left, None)
        if request is None:
            self.transport.close()
        else:
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        if data.endswith(b"0\r\n\r\n"):  # the end of a chunked body
            self.done.append(b"".join(self.parts))
            self.parts = []
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


async def served(host: str, port: int, jobs: list[Job], users: int) -> tuple[float, float, list[bytes]]:
    """Seconds, seconds of this process's processor time, and the answers, through the server's streams."""
    bodies = [
        json.dumps(
            {"prompt": p, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True}
            | {"stream_options": {"include_usage": True}}
        ).encode()
        for p, n in jobs
    ]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    left = iter([head.encode() + b"%d\r\n\r\n" % len(body) + body for body in bodies])
    loop, done = asyncio.get_running_loop(), list[bytes]()
    ended: list[asyncio.Future[None]] = [loop.create_future() for _ in range(users)]
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for one in ended:
        await loop.create_connection(lambda one=one: User(left, done, one), host, port)  # type: ignore[misc]
    await asyncio.gather(*ended)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def check(answers: list[bytes], jobs: list[Job]) -> None:
    """Every answer whole, and all tokens there."""
    told = [int(found) for answer in answers for found in re.findall(rb'"completion_tokens":(\d+)', answer)]
    assert len(answers) == len(jobs) and sum(told) == sum(tokens for _, tokens in jobs), (len(answers), sum(told))


def lags(port: int) -> tuple[float, float]:
    """How often the event loop was asked for its lag so far, and how often it was at most `LAG`."""
    text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    counts = dict(re.findall(r'^dspark_event_loop_lag_seconds_bucket\{le="(.*?)"\} (.*)$', text, re.M))
    return float(counts["+Inf"]), float(counts[str(LAG)])


def start_server(planner: str, users: int, source: Path | None = None) -> tuple[subprocess.Popen[str], int]:
    """A server of this package, or of the one below `source`, and its port."""
    command = [sys.executable, "-m", "dspark.cli.main", "serve", "--port", "0", "--planner", planner]
    path = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
    server = subprocess.Popen(
        [*command, "--max-running", str(users)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=path,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"address: .*:(\d+)/v1", line):
            return server, int(found[1])
    raise SystemExit("the server did not start")


class Turns:
    """The ways to serve the same load, and what each took in every round."""

    def __init__(self, core: EngineCore, jobs: list[Job], users: int, ports: dict[str, int]):
        """`ports` of servers by name, one of them `http`."""
        self.core, self.jobs, self.users, self.ports = core, jobs, users, ports
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("direct", "engine", *self.ports)}
        self.client: list[float] = []
        self.asked = self.in_time = 0.0  # times that the server's event loop told its lag, and of these the good ones

    def round(self, number: int) -> None:
        """Each way once, in another order than the round before: who comes first pays for cold caches."""
        names = list(self.seconds)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            self.seconds[name].append(self.http(name) if name in self.ports else getattr(self, name)())

    def direct(self) -> float:
        return direct(self.core, self.jobs, self.users)

    def engine(self) -> float:
        engine = Engine(self.core)
        seconds = asyncio.run(threaded(engine, self.jobs, self.users))
        engine.close()
        return seconds

    def http(self, name: str) -> float:
        port = self.ports[name]
        before = lags(port)  # only what happens under load counts
        seconds, client, answers = asyncio.run(served("127.0.0.1", port, self.jobs, self.users))
        after = lags(port)
        check(answers, self.jobs)
        if name != "http":
            return seconds
        self.client.append(client)
        self.asked, self.in_time = self.asked + after[0] - before[0], self.in_time + after[1] - before[1]
        return seconds

    def report(self) -> str:
        tokens = sum(count for _, count in self.jobs)
        lines = [f"{self.users} users, {len(self.jobs)} requests, {tokens} tokens, {len(self.client)} rounds"]
        for name, seconds in self.seconds.items():
            costs = sorted(mine / own - 1 for mine, own in zip(seconds, self.seconds["direct"], strict=True))
            spread = f"{100 * median(costs):+5.1f} % ({100 * costs[0]:+.1f} to {100 * costs[-1]:+.1f})"
            lines.append(f"{name:<8}{tokens / median(seconds):8.0f} tokens/s   time over direct {spread}")
        share = median(self.client) / median(self.seconds["direct"])
        lines.append(f"client's processor time: {100 * share:.1f} % of direct's time, in http's number")
        lines.append(f"event loop at most {1000 * LAG:.0f} ms late: {self.in_time:.0f} of {self.asked:.0f} times")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planner", default="full")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--against", type=Path, help="src of another checkout, whose server takes turns as well")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    core = build_engine(demo_target_path(), demo_drafter_path(), asked.planner, max_running=asked.users, seed=0)
    core.wait_compiled()
    servers = {"http": start_server(asked.planner, asked.users)}
    if asked.against is not None:
        servers["against"] = start_server(asked.planner, asked.users, asked.against)
    ports = {name: port for name, (_, port) in servers.items()}
    turns = Turns(core, jobs_of(asked.requests), asked.users, ports)
    try:
        freeze_startup()
        turns.round(0)
        turns.clear()  # that was to warm up
        for number in range(asked.rounds):
            turns.round(number)
    finally:
        for server, _ in servers.values():
            server.terminate()
            server.wait()
    print(f"planner {asked.planner}, {turns.report()}")
    if asked.json:
        asked.json.write_text(json.dumps(turns.seconds | {"client": turns.client}))


if __name__ == "__main__":
    main()
