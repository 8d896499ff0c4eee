"""kill -9 in the middle of idempotent requests: restarted and asked again, or left for another server."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.wire import PROMPTS, Server, content, post, send, status


async def insist(ports: Sequence[int], index: int) -> tuple[int, bytes]:
    """Request `index`, sent again under its key to the next port until one answers; which, and what it says."""
    body = {"prompt": PROMPTS[index % 5], "max_tokens": 60, "temperature": 1, "ignore_eos": True}
    raw = post(body | {"stream": index % 3 == 0}, Idempotency_Key=str(index), x_request_id=str(index))
    for attempt in range(index, index + 2000):
        port = ports[attempt % len(ports)]
        try:
            answer = await send(port, raw)
            if status(answer) == 200 and (whole := content(answer)) is not None:
                return port, whole
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError(f"request {index} was never answered")


def made_by(server: Server) -> Counter[int]:
    """How often a server's log says that it made the answer to each request."""
    lines = server.requests()
    return Counter(int(line["id"]) for line in lines if not line.get("replayed") and line["status"] == 200)


async def crash(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """kill -9 in the middle of idempotent requests, restart, replay."""
    keep = ("--idempotency", str(directory / "answers"))
    server, asked = Server(options, directory, *keep), options.requests
    port, half, limit = server.port, asyncio.Event(), asyncio.Semaphore(16)
    first: dict[int, bytes] = {}
    killed: list[int] = []

    async def once(index: int) -> None:
        async with limit:
            _, first[index] = await insist([port], index)
        if len(first) >= asked // 2:
            half.set()

    async def killer() -> Server:
        await half.wait()
        server.stop(kill=True)
        killed.extend(first)
        return await asyncio.to_thread(Server, options, directory, *keep, port=port)

    _, second = await asyncio.gather(asyncio.gather(*(once(index) for index in range(asked))), killer())
    again = [(await insist([port], index))[1] for index in range(asked)]
    made = made_by(second)
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


async def failover(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Two servers over one Redis; one is killed in the middle, and its clients go to the other."""
    keep, asked = ("--idempotency", options.redis), options.requests
    one, other = await asyncio.gather(*(asyncio.to_thread(Server, options, directory, *keep) for _ in range(2)))
    ports, half, limit = [one.port, other.port], asyncio.Event(), asyncio.Semaphore(16)
    first: dict[int, tuple[int, bytes]] = {}

    async def once(index: int) -> None:
        async with limit:
            first[index] = await insist(ports, index)
        if len(first) >= asked // 2:
            half.set()

    async def killer() -> list[int]:
        await half.wait()
        one.stop(kill=True)
        return [index for index, (port, _) in first.items() if port == one.port]

    _, answered = await asyncio.gather(asyncio.gather(*(once(index) for index in range(asked))), killer())
    again = [(await insist([other.port], index))[1] for index in range(asked)]
    made = made_by(other)
    told = {
        "requests": asked,
        "answered_by_the_killed": len(answered),
        "made_by_the_other": sum(made.values()),
        "made_twice_by_the_other": sum(count > 1 for count in made.values()),
        "answered_by_the_killed_and_made_again": sum(made[index] for index in answered),
        "clients_with_two_results": sum(again[index] != first[index][1] for index in range(asked)),
        "exit": other.stop(),
    }
    bad = ("made_twice_by_the_other", "answered_by_the_killed_and_made_again", "clients_with_two_results", "exit")
    return told, not any(told[name] for name in bad)
