"""A server in a process of its own, and requests as they go over the wire."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
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


async def metrics(port: int) -> dict[str, float]:
    """The server's own numbers without labels."""
    answer = content(await send(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) or b""
    lines = [line.split() for line in answer.decode().splitlines() if line and line[0] != "#" and "{" not in line]
    return {name: float(value) for name, value in lines}


def p(values: list[float], percent: int) -> float:
    """A percentile; not a number of nothing."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)] if values else float("nan")
