"""Requests of random shape, a third left mid-stream; nothing may be lost, doubled or leak."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from faults.wire import PROMPTS, Server, content, metrics, post, send, status


async def soak(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Requests of random shape, a third left mid-stream, some with a reset; nothing may be lost, doubled or leak."""
    server, chance, seen = Server(options, directory, "--queue", "64"), random.Random(0), Counter[str]()
    limit, port = asyncio.Semaphore(32), server.port
    memory: list[int] = []

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
