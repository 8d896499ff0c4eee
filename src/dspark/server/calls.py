"""One HTTP request from its first byte to its last: its id, whose it is, and the line that the log keeps of it."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.engine.request import Commit, RequestStatistics

if TYPE_CHECKING:
    from dspark.server.rates import Account
    from dspark.server.tracing import Rounds

LOG = logging.getLogger("dspark.requests")
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: only the debug log has them
GIVEN_ID = re.compile(rb"[\x21-\x7e]{1,128}")
NO_STATUS = 499  # the client was gone before an answer began


@dataclass(eq=False)
class Call:
    """What is known of a request; made by Calls, filled in on its way."""

    id: str
    method: str
    path: str
    arrived: float = field(default_factory=time.perf_counter)  # s
    key: str | None = None  # the name of its API key
    owner: str = ""  # the key's digest: whose its idempotency keys are
    account: Account | None = None
    status: int = NO_STATUS
    error: str | None = None
    replayed: bool = False  # an answer given before, by Idempotency-Key
    prompts: list[str] | None = None  # kept only where the log is to have them
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None  # s after arrival
    finished: list[RequestStatistics] = field(default_factory=list)  # of its texts
    trace_id: str | None = None
    rounds: Rounds | None = None  # where it is traced

    @property
    def age(self) -> float:
        """Seconds since it arrived."""
        return time.perf_counter() - self.arrived

    def take(self, choice: int, commits: Sequence[Commit], tokens: int) -> None:
        """Commits of one of its texts, at least one, with so many tokens."""
        self.completion_tokens += tokens
        if self.first_token is None:
            self.first_token = self.age
        if commits[-1].finish_reason:
            self.finished.append(commits[-1].statistics)
        if self.rounds is not None:
            for commit in commits:
                self.rounds.take(choice, commit)

    @property
    def line(self) -> dict[str, Any]:
        """What the log says about it when it is over; seconds are rounded to 0.1 ms."""
        told: dict[str, Any] = {"id": self.id, "method": self.method, "path": self.path[:200], "status": self.status}
        told["key"], told["error"] = self.key, self.error
        if self.prompt_tokens:
            told["prompt_tokens"], told["completion_tokens"] = self.prompt_tokens, self.completion_tokens
        if self.finished:
            rounds = sum(text.rounds for text in self.finished)
            told["tokens_per_round"] = round(sum(t.committed for t in self.finished) / rounds, 3) if rounds else None
            told["preemptions"] = sum(text.preemptions for text in self.finished) or None
            waits = [text.admitted - text.arrived for text in self.finished if text.admitted is not None]
            told["queue_s"] = round(max(waits), 4) if waits else None
        told["ttft_s"] = round(self.first_token, 4) if self.first_token is not None else None
        told["total_s"] = round(self.age, 4)
        told["replayed"] = self.replayed or None
        told["trace_id"] = self.trace_id
        told["prompts"] = self.prompts
        return {name: value for name, value in told.items() if value is not None}


def call_of(scope: Scope) -> Call:
    """The call that a request belongs to."""
    call: Call = scope["state"]["call"]
    return call


class Calls:
    """The outermost layer: numbers requests, tells what their key has left, and logs each when it is over."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given.decode() if GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        call = Call(name, scope["method"], scope["path"])
        scope.setdefault("state", {})["call"] = call

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                more = {"x-request-id": call.id} | (call.account.headers if call.account is not None else {})
                own = [(name.encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            await self.app(scope, receive, answering)
        finally:
            level = logging.DEBUG if call.path in QUIET else logging.INFO
            if LOG.isEnabledFor(level):  # a record by hand: nobody looks up the line that wrote it
                told = {"fields": call.line}
                LOG.handle(LOG.makeRecord(LOG.name, level, "", 0, "request", (), None, "", told))
