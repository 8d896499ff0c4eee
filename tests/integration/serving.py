"""A tiny pair behind a real uvicorn on the loopback interface, in a thread of this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
from fastapi import FastAPI
from openai import OpenAI

from dspark.engine.build import build_engine
from dspark.engine.engine import PACE, Engine
from dspark.server.api import create_app
from dspark.server.launch import Server, address, bind, make_server
from dspark.server.service import ServerConfig, Service

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Served:
    """A running server and the clients that speak to it."""

    url: str
    app: FastAPI
    server: Server
    http: httpx2.Client
    openai: OpenAI

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def core(self):
        return self.service.engine.core

    def ask(self, question):
        """`question(core)` between two steps."""
        return asyncio.run(self.service.engine.ask(question))

    def until(self, question) -> None:
        """Wait for `question()` to come true; it may only read."""
        for _ in range(30_000):
            if question():
                return
            time.sleep(0.002)
        raise AssertionError("it never came true")


@contextlib.contextmanager
def serving(
    core,
    config: ServerConfig,
    *,
    grace: int = 5,
    key: str = "none",
    results=None,
    tracing=None,
    pace: float = PACE,
    **options,
) -> Iterator[Served]:
    """The core behind a server; both end with the context, and nothing may be left in the core."""
    with closing_engine(core, pace) as engine:
        app = create_app(engine, config, results, tracing=tracing)
        server, bound = make_server(app, grace=grace, **options), bind("127.0.0.1", 0)
        url = address(bound)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        headers = {"Authorization": f"Bearer {key}"}
        try:
            with (
                httpx2.Client(base_url=url, headers=headers, timeout=60) as http,
                OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
            ):
                yield Served(url, app, server, http, client)
        finally:
            server.should_exit = True
            thread.join()
    assert core.idle
    core.check_integrity()


@contextlib.contextmanager
def closing_engine(core, pace=PACE):
    engine = Engine(core, pace)
    try:
        yield engine
    finally:
        engine.close()


def tiny_core(pair, *, template: str | None = TEMPLATE, **options):
    """The tiny pair of conftest.py as an engine; small enough that a step costs a millisecond or two."""
    given = {"max_running": 8, "pages": 200, "seed": 0, "device": "cpu"} | options
    core = build_engine(pair.target, pair.drafter, "full", **given)
    core.tokenizer.chat_template = template
    return core


class Slow:
    """Stops a core after so many forwards more, so that requests are surely still running, and makes one fail."""

    def __init__(self, core):
        self.left = None  # None: any number
        self.fail = None
        forward = core.runner.forward

        def held(step):
            for _ in range(20_000):  # a test that failed must not hang the rest
                if self.left != 0:
                    break
                time.sleep(0.001)
            if self.left is not None:
                self.left -= 1
            if self.fail is not None:
                error, self.fail = self.fail, None
                raise error
            return forward(step)

        core.runner.forward = held
