"""Nonsense from many clients, some of them slow; never a 5xx, an end, or a hang."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from faults.wire import Server, post, send, status


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
    server, chance, seen = Server(options, directory), random.Random(options.seed), Counter[str]()
    limit = asyncio.Semaphore(32)

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
