"""The asynchronous engine: streams for many callers, one thread that steps.

Callers leave commands for the thread and never touch the core; the thread sends commits to each caller's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.engine.build import build_engine
from dspark.engine.llm import Result
from dspark.engine.request import Commit
from dspark.engine.step import EngineCore
from dspark.models.target import Target


class EngineStopped(RuntimeError):
    """The engine was closed, or a step failed, while a request was in it."""


@dataclass(eq=False)
class _Stream:
    """One caller's end: where its commits go."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Commit | BaseException] = field(default_factory=asyncio.Queue)
    request_id: int | None = None


class Engine:
    """Serves streams. Closing a stream, by leaving its loop or cancelling its task, cancels the request."""

    def __init__(self, core: EngineCore):
        """The core belongs to this engine from now on: nobody else may step it."""
        self.core = core
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[int, _Stream] = {}
        self._wake = threading.Condition()
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._thread.start()

    @staticmethod
    def load(target: str | Path | Target, drafter: str | Path | Drafter | None = "auto", **options: Any) -> Engine:
        """The asynchronous twin of `LLM(target, drafter, **options)`."""
        return Engine(build_engine(target, drafter, **options))

    async def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> AsyncIterator[Commit]:
        """Commits as they happen; the last one has a finish reason."""
        stream = _Stream(asyncio.get_running_loop())
        tokens = await asyncio.to_thread(self.core.intake.tokenize, prompt)
        self._command(lambda: self._add(stream, tokens, params))
        try:
            while True:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            with contextlib.suppress(EngineStopped):  # it has let go of everything already
                self._command(lambda: self._remove(stream))

    async def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Result:
        """The whole text of one prompt."""
        result = Result()
        async for commit in self.stream(prompt, params):
            result.take(commit)
        return result

    def close(self) -> None:
        """Stop after the current step; streams that are still open get EngineStopped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._error is not None or self._closing:
                raise EngineStopped("the engine is closed") from self._error
            self._commands.append(command)
            self._wake.notify()

    def _add(self, stream: _Stream, tokens: Sequence[int], params: SamplingParams | None) -> None:
        try:
            stream.request_id = self.core.add(tokens, params)
            self._streams[stream.request_id] = stream
        except Exception as error:
            self._send([(stream, error)])

    def _remove(self, stream: _Stream) -> None:
        if stream.request_id is not None and self._streams.pop(stream.request_id, None) is not None:
            self.core.cancel(stream.request_id)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self._commands or not self.core.idle)
                    if self._closing:
                        break
                while self._commands:
                    self._commands.popleft()()
                self._deliver(self.core.step())
        except BaseException as error:
            self._error = error
        with self._wake:
            self._closing = True
        stopped = EngineStopped(f"the engine stopped: {self._error or 'it was closed'}")
        stopped.__cause__ = self._error
        for command in self._commands:
            command()  # late arrivals learn of it as well
        self._send([(stream, stopped) for stream in self._streams.values()])
        for request_id in list(self._streams):
            self.core.cancel(request_id)

    def _deliver(self, commits: Sequence[Commit]) -> None:
        addressed: list[tuple[_Stream, Commit | BaseException]] = []
        for commit in commits:
            stream = self._streams.get(commit.request_id)
            if stream is not None:
                addressed.append((stream, commit))
                if commit.finish_reason:
                    del self._streams[commit.request_id]
        self._send(addressed)

    @staticmethod
    def _send(addressed: Sequence[tuple[_Stream, Commit | BaseException]]) -> None:
        """One wake-up of each event loop, however many streams it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Commit | BaseException]]] = {}
        for stream, item in addressed:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, items in by_loop.items():

            def put(items: list[tuple[_Stream, Commit | BaseException]] = items) -> None:
                for stream, item in items:
                    stream.queue.put_nowait(item)

            if not loop.is_closed():
                loop.call_soon_threadsafe(put)
