"""Every place taken, then four times as many arrivals as were served: those keep their speed, the rest hear soon."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from faults.wire import PROMPTS, Server, p, post, send, status

Timed = tuple[int, float]  # status, seconds
PROBES = 20  # a second


async def timed(port: int, raw: bytes) -> Timed:
    """One request on a connection of its own."""
    started = time.perf_counter()
    answer = await send(port, raw)
    return status(answer), time.perf_counter() - started


async def closed(port: int, raw: bytes, *, users: int, seconds: float) -> list[float]:
    """As many users as there are places, each with its next request when it has its answer."""
    end, times = time.perf_counter() + seconds, []

    async def user() -> None:
        while time.perf_counter() < end:
            code, took = await timed(port, raw)
            assert code == 200, code
            times.append(took)

    await asyncio.gather(*(user() for _ in range(users)))
    return times


async def opened(port: int, raw: bytes, *, rate: float, seconds: float) -> list[Timed]:
    """Arrivals at their own times, however long this process sleeps."""
    chance, start, due, tasks = random.Random(1), time.perf_counter(), 0.0, []
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(timed(port, raw)))
        due += chance.expovariate(rate)
    return await asyncio.gather(*tasks)


def probe(port: int, raw: bytes, seconds: float, told: Connection) -> None:
    """A client with nothing else to do: the load generator's own lateness is not in its times."""
    end, times = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(raw)
            answer = connection.recv(1000)
        if status(answer) == 429:
            times.append(time.perf_counter() - started)
        time.sleep(1 / PROBES)
    told.send(times)


async def overload(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Capacity, then four times that."""
    queue = [] if options.queue is None else ["--queue", str(options.queue)]
    server = Server(options, directory, "--max-running", str(options.places), *queue)
    port = server.port
    raw = post({"prompt": PROMPTS[0], "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True})
    await closed(port, raw, users=options.places, seconds=3)
    capacity = await closed(port, raw, users=options.places, seconds=options.seconds)
    rate = len(capacity) / options.seconds
    apart = multiprocessing.get_context("spawn")
    hearing, told = apart.Pipe(duplex=False)
    probing = apart.Process(target=probe, args=(port, raw, options.seconds, told))
    probing.start()
    before = time.process_time()
    results = await opened(port, raw, rate=4 * rate, seconds=options.seconds)
    share = (time.process_time() - before) / options.seconds
    probed = await asyncio.to_thread(hearing.recv)
    probing.join()
    clean = server.stop()
    served = [took for code, took in results if code == 200]
    refused = [took for code, took in results if code == 429]
    inside = [line["total_s"] for line in server.requests() if line["status"] == 429]
    result = {
        "capacity_per_s": round(rate, 1),
        "offered_per_s": round(len(results) / options.seconds, 1),
        "served": len(served),
        "refused": len(refused),
        "other": len(results) - len(served) - len(refused),
        "client_cores": round(share, 3),
        "p95_at_capacity_ms": round(1000 * p(capacity, 95), 1),
        "p95_overloaded_ms": round(1000 * p(served, 95), 1),
        "p95_ratio": round(p(served, 95) / p(capacity, 95), 3),
        "refused_p50_p95_p99_ms": milliseconds(refused),
        "refused_by_the_probe_ms": milliseconds(probed),
        "refused_inside_the_server_ms": milliseconds(inside),
        "exit": clean,
    }
    return result, result["p95_ratio"] <= 1.3 and p(refused, 95) <= 0.05 and not result["other"]


def milliseconds(seconds: list[float]) -> list[float]:
    """Median, 95th and 99th percentile."""
    return [round(1000 * p(seconds, percent), 2) for percent in (50, 95, 99)]
