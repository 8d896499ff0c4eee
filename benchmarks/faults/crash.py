"""kill -9 in the middle of idempotent requests, restart, replay."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from faults.wire import PROMPTS, Server, content, post, send, status


async def crash(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """kill -9 in the middle of idempotent requests, restart, replay."""
    keep = ("--idempotency", str(directory / "answers"))
    server, asked = Server(options, directory, *keep), options.requests
    port, half, limit = server.port, asyncio.Event(), asyncio.Semaphore(16)
    first: dict[int, bytes] = {}
    killed: list[int] = []

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
