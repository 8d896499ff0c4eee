"""Between the web and the engine: what a request has to pass, and what comes back, watched by the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from dspark.common.chat import render_chat
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.delivery import Placed
from dspark.engine.engine import SHORT, DeadlinePassed, Engine, EngineStopped, StepFailed
from dspark.engine.request import Commit
from dspark.server.answers import Decode, Piece, Usage
from dspark.server.calls import Call
from dspark.server.engine_metrics import EngineState
from dspark.server.errors import LOG, ApiError
from dspark.server.keys import ApiKey
from dspark.server.limits import Gate, usual_queue
from dspark.server.metrics import Metrics
from dspark.server.protocol import ChatMessage
from dspark.server.rates import Rates
from dspark.server.tools import Tool

ASK_SECONDS = 1.0  # how long /metrics waits for the end of a step before it tells the state before


@dataclass(frozen=True)
class ServerConfig:
    """What a server allows; the engine's own limits are in EngineConfig."""

    name: str = "default"  # of the model, as clients ask for it
    queue: int | None = None  # texts that may wait for a place in the engine; None: usual_queue
    most_body_bytes: int = 2 << 20
    most_prompt_tokens: int | None = None  # None: as the context has room
    keys: tuple[str, ...] = ()  # as ApiKey.parse takes them
    requests_per_minute: int | None = None  # of each key that says nothing else; without keys, of all together
    tokens_per_minute: int | None = None
    request_seconds: float | None = 600.0  # from a request's arrival to its last token
    stuck_seconds: float = 120.0  # a step that takes longer is taken for a device that hangs
    log_prompts: bool = False
    most_answer_bytes: int = 4 << 20  # of an answer that is kept for its Idempotency-Key
    body_seconds: float = 30.0  # from a request's headers to the end of its body
    origins: tuple[str, ...] = ()  # of pages that browsers may call from; none by default
    playground: bool = True  # the page at /

    def __post_init__(self) -> None:
        if self.queue is not None and self.queue < 0:
            raise UserError(f"queue {self.queue} is below 0; pass 0 to refuse whatever would have to wait")
        for name in ("most_body_bytes", "most_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is below 1; pass 1 or more")
        for name in ("request_seconds", "stuck_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} {value} is not above 0; pass a number of seconds")
        _ = self.api_keys  # raises UserError for one that cannot be read

    @property
    def rates(self) -> Rates:
        """What a key may use that says nothing else."""
        return Rates(self.requests_per_minute, self.tokens_per_minute)

    @property
    def api_keys(self) -> list[ApiKey]:
        """The keys, read."""
        return [ApiKey.parse(line, self.rates) for line in self.keys]


class Service:
    """One engine, served under one name."""

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine, self.config = engine, config
        self.metrics = Metrics()
        running = engine.core.config.max_running
        self.gate = Gate(running, usual_queue(running) if config.queue is None else config.queue)
        core = engine.core
        told = f"{config.name} {core.target.dtype} {core.target.device.type} {package_version()}"
        self.fingerprint = f"dspark_{hashlib.sha256(told.encode()).hexdigest()[:10]}"
        self.decode: Decode = functools.lru_cache(maxsize=1 << 16)(self._decode)

    @property
    def context(self) -> int:
        """Tokens a text may reach, its prompt included."""
        return self.engine.core.intake.context_limit

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not this one."""
        if name is not None and name != self.config.name:
            message = f"the model {name!r:.80} is not here; ask for {self.config.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens. Raises ApiError 400 for one too long."""
        if len(prompt) <= SHORT:
            return self._fitting(self._tokenize(prompt))
        return self._fitting(await asyncio.to_thread(self._tokenize, prompt))

    async def chat_tokens(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[int]:
        """A conversation's tokens, through the target's template."""
        rendered = [message.as_template() for message in messages]
        options = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools else {}
        render = functools.partial(render_chat, self.engine.core.tokenizer, rendered, **options)
        tokens = await asyncio.to_thread(render)
        return self._fitting(tokens)

    async def pieces(
        self,
        jobs: Sequence[tuple[list[int], SamplingParams]],
        usage: Usage,
        *,
        choices: int,
        call: Call,
        deadline_ms: int | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The texts of `jobs`, `choices` of them for each prompt, as they come; counts into `usage` and `call`.

        Raises ApiError: 429 without room or over the key's rates, 504 past the deadline, 500 and 503 for the engine.
        """
        fresh = {place for place in range(len(jobs)) if place % choices == 0}
        usage.prompt = call.prompt_tokens = sum(len(jobs[place][0]) for place in fresh)
        if self.config.log_prompts and (tokenizer := self.engine.core.tokenizer) is not None:
            call.prompts = [tokenizer.decode(jobs[place][0]) for place in sorted(fresh)]
        with self.gate.enter(len(jobs)), self._reserved(call, jobs):
            watches = [self.metrics.watch() for _ in jobs]
            seconds = self._seconds_left(call, deadline_ms)
            try:
                async with aclosing(self.engine.batches(jobs, seconds=seconds)) as batches:
                    async for batch in batches:
                        for place, commits in _by_place(batch, len(jobs)):
                            tokens = sum([len(commit.token_ids) for commit in commits])
                            usage.completion += tokens
                            watches[place].take(commits, tokens)
                            call.take(place, commits, tokens)
                            if place in fresh:
                                fresh.discard(place)
                                usage.cached += commits[0].statistics.cached_tokens
                            if (trouble := commits[-1].error) is not None:
                                said = f"the text cannot follow its grammar any further: {trouble}; simplify it"
                                raise ApiError(400, said, code="grammar_failed")
                            yield Piece.of(place, commits)
            except (StepFailed, EngineStopped, DeadlinePassed) as error:
                told = _failure(error)
                call.error = told.code
                raise told from error

    @contextlib.contextmanager
    def _reserved(self, call: Call, jobs: Sequence[tuple[list[int], SamplingParams]]) -> Iterator[None]:
        """Tokens of the key's account set aside as long as the context is open, then settled by what was used."""
        account = call.account
        if account is None:
            yield
            return
        room = (
            self.context - len(tokens)
            if params.max_tokens is None
            else min(params.max_tokens, self.context - len(tokens))
            for tokens, params in jobs
        )
        reserved = account.reserve(call.prompt_tokens + sum(room))
        try:
            yield
        finally:
            account.settle(reserved, call.prompt_tokens + call.completion_tokens)

    def _seconds_left(self, call: Call, deadline_ms: int | None) -> float | None:
        bounds = [self.config.request_seconds, None if deadline_ms is None else deadline_ms / 1000]
        known = [bound for bound in bounds if bound is not None]
        return max(0.0, min(known) - call.age) if known else None

    async def refresh(self) -> None:
        """Read the engine's state for the metrics; one that is in a long step, or has stopped, keeps its last."""
        self.metrics.failed_steps, self.metrics.step_age = self.engine.failed_steps, self.engine.step_seconds
        with contextlib.suppress(EngineStopped, TimeoutError):
            self.metrics.state = await asyncio.wait_for(self.engine.ask(EngineState.of), ASK_SECONDS)

    @property
    def trouble(self) -> str | None:
        """What keeps the engine from serving; None while it serves."""
        if self.engine.stopped is not None:
            return "the engine has stopped"
        if self.engine.step_seconds > self.config.stuck_seconds:
            return f"a step has taken {self.engine.step_seconds:.0f} s; the device seems to hang"
        return None

    def _tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        try:
            return self.engine.core.intake.tokenize(prompt)
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair is no text
            raise UserError("the prompt is not valid Unicode; send UTF-8") from error

    def _fitting(self, tokens: list[int]) -> list[int]:
        most = min(self.config.most_prompt_tokens or self.context - 1, self.context - 1)
        if len(tokens) > most:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens, at most {most} fit; shorten it",
                code="context_length_exceeded",
            )
        return tokens

    def _decode(self, token: int) -> str:
        tokenizer = self.engine.core.tokenizer
        return tokenizer.decode([token]) if tokenizer is not None else str(token)


def _by_place(batch: list[Placed], places: int) -> Iterable[tuple[int, list[Commit]]]:
    """The commits of each text among so many."""
    if places == 1:
        return [(0, [commit for _, commit in batch])]
    found: dict[int, list[Commit]] = {}
    for place, commit in batch:
        found.setdefault(place, []).append(commit)
    return found.items()


def _failure(error: BaseException) -> ApiError:
    """What the client of a text hears that did not come to its end."""
    if isinstance(error, StepFailed):
        LOG.error("a step failed", exc_info=error)
        return ApiError(500, "a step of the engine failed with this request in it; send it again", code="step_failed")
    if isinstance(error, DeadlinePassed):
        return ApiError(504, f"{error}; ask for less or allow more time", code="deadline_exceeded")
    return ApiError(503, "the engine has stopped; ask another server", code="engine_stopped")


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("dspark")
    except PackageNotFoundError:
        return "unknown"
