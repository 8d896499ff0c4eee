"""A server under bad luck: killed while it answers, soaked, overloaded, and sent nonsense. (issue 5's bars)

    python benchmarks/server_faults.py crash --requests 200
    python benchmarks/server_faults.py soak --requests 10000
    python benchmarks/server_faults.py overload --seconds 15
    python benchmarks/server_faults.py fuzz --requests 5000

Starts `dspark serve` in a process of its own on a free port, with the demo pair unless --target and --drafter
say otherwise, prints what happened as one JSON object, and exits 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PROMPTS = ("def add(a, b):", "class Stack:\n", "import os\n\ndef main():", "for i in range(10):", "x = [", "# " * 60)


class Server:
    """`dspark serve` in its own process; its log in a file."""

    def __init__(self, options: argparse.Namespace, directory: Path, *more: str, port: int = 0):
        pair = [options.target, "--drafter", options.drafter] if options.target else []
        command = [sys.executable, "-m", "dspark.cli.main", "serve", *pair, "--port", str(port), "--log-format", "json"]
        self.log = directory / f"log-{time.time_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, _, value = line.partition(":")
            if name == "address":
                self.port = int(value.rsplit(":", 1)[1].split("/")[0])
                return
        raise SystemExit(f"the server did not start:\n{self.log.read_text()}")

    def requests(self) -> list[dict[str, Any]]:
        """The log's lines about requests."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == "request"]

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, kill: bool = False) -> int:
        """End it; its exit status."""
        self.process.kill() if kill else self.process.terminate()
        return self.process.wait(60)


async def send(port: int, raw: bytes, seconds: float = 120.0) -> bytes:
    """Everything the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        await writer.drain()
        return await asyncio.wait_for(reader.read(-1), seconds)
    finally:
        writer.close()


def post(body: dict[str, Any] | bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    """A request as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {
        "Host": "x",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
    }
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in (given | headers).items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def status(answer: bytes) -> int:
    """0 where there is none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if answer.startswith(b"HTTP/1.1 ") and words[1].isdigit() else 0


def content(answer: bytes) -> bytes | None:
    """The body; None where it is not whole."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if b"content-length" in lines:
        return rest if len(rest) == int(lines[b"content-length"]) else None
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size or b"0", 16)
        if count == 0:
            return body
        body, rest = body + rest[:count], rest[count + 2 :]
    return None


async def crash(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """kill -9 in the middle of idempotent requests, restart, replay."""
    keep = ("--idempotency", str(directory / "answers"))
    server, asked, first = Server(options, directory, *keep), options.requests, {}
    port, half, limit, killed = server.port, asyncio.Event(), asyncio.Semaphore(16), []

    async def client(index: int) -> bytes:
        body = {"prompt": PROMPTS[index % 5], "max_tokens": 60, "temperature": 1, "ignore_eos": True}
        raw = post(body | {"stream": index % 2 == 0}, Idempotency_Key=str(index), x_request_id=str(index))
        for _ in range(2000):
            try:
                answer = await send(port, raw)
                if status(answer) == 200 and (whole := content(answer)) is not None:
                    return whole
            except OSError:
                pass
            await asyncio.sleep(0.1)
        raise AssertionError(f"request {index} was never answered")

    async def once(index: int) -> None:
        async with limit:
            first[index] = await client(index)
        if len(first) >= asked // 2:
            half.set()

    async def killer() -> Server:
        await half.wait()
        server.stop(kill=True)
        killed.extend(first)
        return await asyncio.to_thread(Server, options, directory, *keep, port=port)

    _, second = await asyncio.gather(asyncio.gather(*(once(index) for index in range(asked))), killer())
    again = [await client(index) for index in range(asked)]
    made = Counter(int(line["id"]) for line in second.requests() if not line.get("replayed") and line["status"] == 200)
    clean = second.stop()
    told = {
        "requests": asked,
        "answered_before_the_kill": len(killed),
        "generated_after_it": sum(made.values()),
        "generated_twice_after_it": sum(count > 1 for count in made.values()),
        "answered_before_and_generated_again": sum(made[index] for index in killed),
        "clients_with_two_results": sum(again[index] != first[index] for index in range(asked)),
        "exit": clean,
    }
    bad = ("generated_twice_after_it", "answered_before_and_generated_again", "clients_with_two_results", "exit")
    return told, not any(told[name] for name in bad)


async def metrics(port: int) -> dict[str, float]:
    """The server's own numbers without labels."""
    answer = content(await send(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) or b""
    lines = [line.split() for line in answer.decode().splitlines() if line and line[0] != "#" and "{" not in line]
    return {name: float(value) for name, value in lines}


async def soak(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Requests of random shape, a third left mid-stream, some with a reset; nothing may be lost, doubled or leak."""
    server, chance, seen, limit = Server(options, directory, "--queue", "64"), random.Random(0), Counter(), None
    limit, memory, port = asyncio.Semaphore(32), [], server.port

    async def client(index: int) -> None:
        n, tokens, leave = chance.choice((1, 1, 1, 2, 4)), chance.randint(1, options.tokens), index % 3 == 0
        body = {
            "prompt": chance.choice(PROMPTS),
            "max_tokens": tokens,
            "n": n,
            "temperature": chance.choice((0, 0.8, 1)),
        }
        body |= {"ignore_eos": True, "stream": leave or chance.random() < 0.5, "seed": chance.choice((None, index))}
        async with limit:
            if index % (options.requests // 20 or 1) == 0:
                memory.append(server.memory())
            if leave:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(post(body)[: chance.choice((40, 10**6, 10**6, 10**6))])
                await asyncio.wait(
                    [asyncio.ensure_future(reader.read(chance.choice((1, 300))))], timeout=chance.random()
                )
                writer.transport.abort() if chance.random() < 0.5 else writer.close()
                seen["left"] += 1
                return
            answer = await send(port, post(body))
        whole = content(answer)
        if status(answer) != 200 or whole is None:
            seen[f"status {status(answer)}"] += 1
            return
        finished = whole.count(b'"finish_reason":"length"')
        seen["whole" if finished == n else "lost" if finished < n else "doubled"] += 1

    before_the_server()
    await asyncio.gather(*(client(index) for index in range(options.requests)))
    for _ in range(100):
        state = await metrics(port)
        if not state["dspark_num_requests_running"] + state["dspark_num_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    half = memory[len(memory) // 2 :]
    growth = statistics.median(half[-3:]) / statistics.median(half[:3]) - 1
    leaked = [
        state[f"dspark_{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ]
    told = {
        "requests": options.requests,
        **seen,
        "leaked": sum(leaked),
        "failed_steps": state["dspark_engine_failed_steps_total"],
    }
    told |= {"memory_growth_last_half": round(growth, 4), "memory_mb": round(memory[-1] / 2**20), "exit": server.stop()}
    answered = seen["whole"] + seen["left"] == options.requests
    flat = growth <= 0.02 or options.short  # too few requests to be warm
    return told, answered and flat and not (told["leaked"] or told["failed_steps"] or told["exit"])


async def overload(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Every place taken without a queue, then four times as many arrivals as were served."""
    queue = [] if options.queue is None else ["--queue", str(options.queue)]
    server, chance = (
        Server(options, directory, "--max-running", str(options.places), *queue, "--log-level", "warning"),
        random.Random(1),
    )
    port, raw = (
        server.port,
        post({"prompt": PROMPTS[0], "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True}),
    )

    async def timed() -> tuple[int, float]:
        started = time.perf_counter()
        answer = await send(port, raw)
        return status(answer), time.perf_counter() - started

    async def closed(seconds: float) -> list[float]:
        end, times = time.perf_counter() + seconds, []

        async def user() -> None:
            while time.perf_counter() < end:
                code, took = await timed()
                assert code == 200, code
                times.append(took)

        await asyncio.gather(*(user() for _ in range(options.places)))
        return times

    async def opened(rate: float, seconds: float) -> list[tuple[int, float]]:
        start, due, tasks = time.perf_counter(), 0.0, []
        while due < seconds:  # arrivals are at their own times, however long the client sleeps
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(timed()))
            due += chance.expovariate(rate)
        return await asyncio.gather(*tasks)

    before_the_server()
    await closed(3)
    capacity = await closed(options.seconds)
    rate = len(capacity) / options.seconds
    results = await opened(4 * rate, options.seconds)
    served = [took for code, took in results if code == 200]
    refused = [took for code, took in results if code == 429]
    told = {
        "capacity_per_s": round(rate, 1),
        "offered_per_s": round(len(results) / options.seconds, 1),
        "served": len(served),
        "refused": len(refused),
        "other": len(results) - len(served) - len(refused),
        "p95_at_capacity_ms": round(1000 * p(capacity, 95), 1),
        "p95_overloaded_ms": round(1000 * p(served, 95), 1),
        "p95_ratio": round(p(served, 95) / p(capacity, 95), 3),
        "refused_p50_p95_p99_ms": [round(1000 * p(refused, q), 1) for q in (50, 95, 99)],
        "exit": server.stop(),
    }
    return told, told["p95_ratio"] <= 1.3 and told["refused_p50_p95_p99_ms"][1] <= 50 and not told["other"]


def before_the_server() -> None:
    """In a run at real-time priority: the client comes first, or its requests come late."""
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_getparam(0).sched_priority + 1))


def p(values: list[float], percent: int) -> float:
    """A percentile; not a number of nothing."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)] if values else float("nan")


def nonsense(chance: random.Random) -> bytes:
    """One thing that nobody should send."""
    junk = chance.randbytes(chance.randint(0, 400))
    number = chance.choice(["1e999", "-1", "9" * 400, "NaN", "1e-320", "-0", "true", "[]", '"\\ud800"', "null", "0.1"])
    field = chance.choice(
        ["max_tokens", "temperature", "n", "seed", "top_k", "logit_bias", "prompt", "stop", "stream", "dspark"]
    )
    good = b'{"prompt": "a", "max_tokens": 2}'
    return chance.choice(
        [
            lambda: junk,
            lambda: post(junk),
            lambda: post(f'{{"prompt": "a", "max_tokens": 2, "{field}": {number}}}'.encode()),
            lambda: post(b"[" * chance.randint(1, 5000) + junk),
            lambda: post(b'{"a":' * chance.randint(1, 5000), "/v1/chat/completions"),
            lambda: post(b'{"prompt": "' + junk.replace(b'"', b"") + b'"}'),
            lambda: post(good)[: chance.randint(1, 200)],
            lambda: post(good, **{"X" * chance.randint(1, 9000): "y" * chance.randint(1, 90_000)}),
            lambda: post(good, Idempotency_Key=chance.choice(["", "a" * 300, "a"]), Authorization="Bearer \xff"),
            lambda: post(good, Content_Length=chance.choice(["-1", "1e9", "99999999999999999999", "3", "x"])),
            lambda: post(good, Transfer_Encoding="chunked"),
            lambda: post(
                good, Content_Type=chance.choice(["text/plain", "a/b;" * 99, "application/json; charset=utf-7"])
            ),
            lambda: b"GET /" + junk.hex().encode() + b"%00%ff/../.. HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            lambda: b"BREW /v1/completions HTTP/9.9\r\n\r\n" + junk,
            lambda: post({"tokens": [chance.choice([-1, 2**31, 2**70, 10**6, 1])] * 9}, "/detokenize"),
            lambda: post(
                {"prompt": [chance.choice([-1, 2**31, 4095, 10**6])] * chance.randint(0, 3000), "max_tokens": 1}
            ),
        ]
    )()


async def fuzz(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Nonsense from 32 clients, some of them slow; never a 5xx, an end, or a hang."""
    server, chance, seen, limit = (
        Server(options, directory),
        random.Random(options.seed),
        Counter(),
        asyncio.Semaphore(32),
    )

    async def client(index: int) -> None:
        raw = nonsense(chance)
        async with limit:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                for part in (raw[:20], raw[20:]) if index % 50 == 0 else (raw,):
                    writer.write(part)
                    await asyncio.sleep(0.5 if index % 50 == 0 else 0)
                reading = asyncio.ensure_future(reader.read(-1))
                if index % 25 and not (await asyncio.wait([reading], timeout=1.0))[0]:
                    writer.write_eof()  # half a request is over; the others are waited for to the server's own limits
                answer = await asyncio.wait_for(reading, 60)
                seen[str(status(answer))] += 1
                if status(answer) >= 500:
                    print(f"{answer[-300:]!r} to {raw[:300]!r}", file=sys.stderr)
                writer.close()
            except TimeoutError:
                seen["hang"] += 1
            except OSError:  # closed while there was more to say
                seen["reset"] += 1

    await asyncio.gather(*(client(index) for index in range(options.requests)))
    good = await send(server.port, post({"prompt": "a", "max_tokens": 2}))
    told = {"requests": options.requests, "answers": dict(sorted(seen.items())), "then_served": status(good) == 200}
    told |= {"exit": server.stop()}
    return told, told["then_served"] and not (
        told["exit"] or seen["hang"] or any(code.startswith("5") for code in seen)
    )


def main() -> None:
    """One fault, told as JSON."""
    faults = {"crash": crash, "soak": soak, "overload": overload, "fuzz": fuzz}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=faults)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each part of overload")
    parser.add_argument("--places", type=int, default=64, help="of overload: texts at once, the server's default")
    parser.add_argument("--queue", type=int, help="of overload: default, the server's own")
    parser.add_argument("--tokens", type=int, default=64, help="of each text of overload, at most of soak")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz")
    parser.add_argument("--short", action="store_true", help="a run too short to judge memory by")
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        told, kept = asyncio.run(faults[options.fault](options, Path(directory)))
    print(json.dumps({"fault": options.fault, "kept": kept, **told}))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
