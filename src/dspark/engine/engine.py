"""The asynchronous engine: streams for many callers, one thread that steps.

Callers leave commands for the thread and never touch the core; the thread sends commits to each caller's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from dspark.common.sampling_params import SamplingParams
from dspark.common.threads import release_team
from dspark.drafters.base import Drafter
from dspark.engine.build import build_engine
from dspark.engine.delivery import LONGEST, Delivery, Parcel, Placed, Stream
from dspark.engine.llm import Result
from dspark.engine.request import Commit
from dspark.engine.step import EngineCore, RequestsFailed
from dspark.models.target import Target

Prompt = str | Sequence[int]
PACE = 0.02  # s, from one sending of a stream's middle to the next at least
SHORT = 2048  # characters, or tokens, that are looked at on the event loop
Answer = TypeVar("Answer")


class EngineStopped(RuntimeError):
    """The engine was closed, or could not go on, while a request was in it."""


class StepFailed(RuntimeError):
    """A step failed with this request in it; requests that were waiting, and later ones, are served."""


class DeadlinePassed(TimeoutError):
    """A request was not done in the time it was given; it has left the engine."""


class Engine:
    """Serves streams. Closing a stream, by leaving its loop or cancelling its task, cancels the request."""

    def __init__(self, core: EngineCore, pace: float = PACE):
        """The core belongs to this engine from now on: nobody else may step it. `pace` in seconds, see delivery.py."""
        self.core = core
        self._delivery = Delivery(pace)
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[int, Stream] = {}
        self._wake = threading.Condition()
        self._error: BaseException | None = None
        self._closing = False
        self._step_started: float | None = None
        self._prefill_seconds = 0.0  # that the last step took which computed prompts
        self.failed_steps = 0
        release_team()  # of the thread that built the core
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._thread.start()

    @staticmethod
    def load(target: str | Path | Target, drafter: str | Path | Drafter | None = "auto", **options: Any) -> Engine:
        """The asynchronous twin of `LLM(target, drafter, **options)`."""
        return Engine(build_engine(target, drafter, **options))

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Commit]:
        """Commits as they happen; the last one has a finish reason."""
        async with aclosing(self.streams([(prompt, params)])) as commits:
            async for _, commit in commits:
                yield commit

    async def streams(
        self, asked: Sequence[tuple[Prompt, SamplingParams | None]], *, seconds: float | None = None
    ) -> AsyncGenerator[Placed, None]:
        """The commits of several prompts as they happen, each with its prompt's place in `asked`; as `batches`."""
        async with aclosing(self.batches(asked, seconds=seconds)) as batches:
            async for batch in batches:
                for placed in batch:
                    yield placed

    async def batches(
        self, asked: Sequence[tuple[Prompt, SamplingParams | None]], *, seconds: float | None = None
    ) -> AsyncGenerator[list[Placed], None]:
        """The commits of several prompts as they happen, those of one sending together.

        They belong together: an error of one ends all. Raises UserError for what cannot be served, StepFailed where
        a step with one of them failed, DeadlinePassed when they are not all done after `seconds`: they leave the
        engine before its next step, whether or not anybody is waiting for a commit here.
        """
        loop = asyncio.get_running_loop()
        stream = Stream(loop)
        late = loop.call_later(seconds, self._expire, stream, seconds) if seconds is not None else None
        try:
            tokens = [await self._tokens(prompt) for prompt, _ in asked]
            for grammar in {params.grammar for _, params in asked if params is not None and params.grammar is not None}:
                await asyncio.to_thread(self.core.intake.grammars.matcher, grammar)  # compiled there, and remembered
            jobs = [(own, params) for own, (_, params) in zip(tokens, asked, strict=True)]
            self._command(lambda: self._add(stream, jobs))
            left = len(jobs)
            while left:
                parcel = await stream.take()
                left -= parcel.finished
                if parcel.commits:
                    yield parcel.commits
                if left and parcel.error is not None:
                    raise parcel.error
        finally:
            if late is not None:
                late.cancel()
            self._let_go(stream)

    def _expire(self, stream: Stream, seconds: float) -> None:
        self._let_go(stream)
        stream.put(Parcel(error=DeadlinePassed(f"the request was not done after {seconds:.1f} s")))

    def _let_go(self, stream: Stream) -> None:
        with contextlib.suppress(EngineStopped):  # it has let go of everything already
            self._command(lambda: self._remove(stream))

    async def _tokens(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens, by another thread if they may take long: handing over costs as much as a page of text."""
        if len(prompt) <= SHORT:
            return self.core.intake.tokenize(prompt)
        return await asyncio.to_thread(self.core.intake.tokenize, prompt)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Result:
        """The whole text of one prompt."""
        result = Result()
        async for commit in self.stream(prompt, params):
            result.take(commit)
        return result

    async def ask(self, question: Callable[[EngineCore], Answer]) -> Answer:
        """The answer of `question(core)`, asked between two steps, when nothing of the core is in motion."""
        answer: Future[Answer] = Future()

        def reply() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question(self.core))
                except Exception as error:
                    answer.set_exception(error)

        self._command(reply)
        return await asyncio.wrap_future(answer)

    @property
    def stopped(self) -> BaseException | None:
        """Why this engine serves nobody any more; None while it does."""
        return self._error or (EngineStopped("the engine is closed") if self._closing else None)

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has been running, 0 between steps: a device that hangs lets it grow."""
        started = self._step_started
        return time.monotonic() - started if started is not None else 0.0

    def close(self, seconds: float | None = None) -> None:
        """Stop after the current step, waiting `seconds` for it at most; open streams get EngineStopped."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)

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

    def _add(self, stream: Stream, jobs: Sequence[tuple[Prompt, SamplingParams | None]]) -> None:
        try:
            for place, (prompt, params) in enumerate(jobs):
                request_id = self.core.add(prompt, params)
                stream.open[request_id] = place
                self._streams[request_id] = stream
        except Exception as error:
            self._remove(stream)
            self._end([stream], error)

    def _remove(self, stream: Stream) -> None:
        self._delivery.drop(stream)
        for request_id in stream.open:
            if self._streams.pop(request_id, None) is not None:
                self.core.cancel(request_id)

    def _step(self) -> None:
        """One step. One that fails ends the requests to blame, or all in it; the engine goes on if it has its pages."""
        self._step_started = started = time.monotonic()
        prefilling = self.core.admission.prefilling
        if prefilling and self._prefill_seconds > LONGEST:
            self._delivery.send(everything=True)  # nobody shall wait for that
        try:
            for commit in self.core.step():
                self._deliver(commit)
            self._delivery.send()
        except Exception as error:
            self.failed_steps += 1
            hit = [self._streams.pop(request_id, None) for request_id in self._abandon(error)]
            failure = StepFailed(f"a step failed: {error}")
            failure.__cause__ = error
            self._end([stream for stream in dict.fromkeys(hit) if stream is not None], failure)
        finally:
            self._step_started = None
            if prefilling:
                self._prefill_seconds = time.monotonic() - started

    def _abandon(self, error: Exception) -> list[int]:
        return self.core.abandon(error.request_ids if isinstance(error, RequestsFailed) else None)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self._commands or not self.core.idle)
                    if self._closing:
                        break
                while self._commands:
                    self._commands.popleft()()
                self._step()
        except BaseException as error:
            self._error = error
        with self._wake:
            self._closing = True
        stopped = EngineStopped(f"the engine stopped: {self._error or 'it was closed'}")
        stopped.__cause__ = self._error
        for command in self._commands:
            command()  # late arrivals learn of it as well
        self._end(list(dict.fromkeys(self._streams.values())), stopped)
        for request_id in list(self._streams):
            self.core.cancel(request_id)

    def _deliver(self, commit: Commit) -> None:
        stream = self._streams.get(commit.request_id)
        if stream is not None:
            self._delivery.put(stream, stream.open[commit.request_id], commit)
            if commit.finish_reason:
                del self._streams[commit.request_id]

    def _end(self, streams: Sequence[Stream], error: BaseException) -> None:
        for stream in streams:
            self._delivery.end(stream, error)
        self._delivery.send()
