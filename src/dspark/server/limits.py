"""What keeps a server standing: the size, the depth and the slowness of bodies, and how many texts are inside."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.server.errors import ApiError

REMEMBERED = 32  # finished requests from which the wait of a refused one is guessed
LONGEST_WAIT = 60
CLOSE = {"Connection": "close"}
MOST_DEPTH = 64
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a string, whatever it holds, or a bracket


class Bodies:
    """Reads a request's body before anything else runs, up to a size and for a time."""

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float):
        self.app = app
        self.most_bytes, self.seconds = most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 to a large body and 408 to a slow one."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):  # a task less than wait_for
                body = await self._read(receive)
        except TimeoutError:
            late = ApiError(408, f"the body took more than {self.seconds:g} s; send it faster", headers=CLOSE)
            await late.answer(scope, receive, send)
            return
        except ApiError as error:
            await error.answer(scope, receive, send)
            return
        if body is None:
            return  # the client went away: there is nobody to answer
        await self.app(scope, read_again(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.most_bytes:
                limit = f"the body is larger than {self.most_bytes} bytes; shorten the prompt"
                raise ApiError(413, limit, code="request_too_large", headers=CLOSE)
            if not message.get("more_body"):
                check_depth(whole := bytes(body))
                return whole


def read_again(body: bytes, receive: Receive) -> Receive:
    """`receive` for whoever is next, who wants the body that was read already."""
    unread: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return unread.popleft() if unread else await receive()

    return replay


def check_depth(body: bytes, most: int = MOST_DEPTH) -> None:
    """Raises ApiError 400 where brackets of JSON lie more than `most` deep: readers of JSON go down by recursion."""
    if body.count(b"[") + body.count(b"{") <= most:
        return  # most bodies; counting is fast
    depth = 0
    for found in BRACKETS.finditer(body):
        bracket = found.group()
        if bracket in b"[{":
            depth += 1
            if depth > most:
                raise ApiError(400, f"the body is nested more than {most} deep; flatten it", code="too_deep")
        elif bracket in b"]}":
            depth -= 1


def usual_queue(running: int) -> int:
    """How many texts may wait where nobody says: a 32nd of the places, for what waits makes every wait longer."""
    return max(1, running // 32)


class Gate:
    """Counts the texts being generated, and refuses what would make the queue too long."""

    def __init__(self, running: int, queue: int):
        """`running` texts at once, and `queue` more that wait."""
        self.running, self.queue = running, queue
        self.inside = 0
        self.closed = False  # on the way out: nobody comes in any more
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def check(self, texts: int) -> None:
        """Raises ApiError 429 while there is no place for `texts`, 503 when the server is leaving."""
        if self.closed:
            raise ApiError(503, "the server is shutting down; ask another", code="shutting_down", headers=CLOSE)
        places = self.running + self.queue
        if texts > places:
            raise ApiError(400, f"{texts} texts are more than this server's {places} places; ask for fewer at a time")
        if self.inside + texts > places:
            raise ApiError(
                429,
                f"{self.inside} texts are being generated or wait, {texts} more are over the limit of {places}",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self.wait)},
            )

    @contextmanager
    def enter(self, texts: int) -> Iterator[None]:
        """Hold a place for `texts`, checked, as long as the context is open."""
        self.check(texts)
        self.inside += texts
        started = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.inside -= texts
            self._seconds.append(asyncio.get_running_loop().time() - started)

    @property
    def wait(self) -> int:
        """Seconds until a place is likely to be free: the usual time of a request over the places in use."""
        usual = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return min(max(1, round(usual * max(1, self.inside) / self.running)), LONGEST_WAIT)


class Full:
    """Refuses a request for which there is no place before its body is read: at overload that is most of the work.

    One that brings an Idempotency-Key goes on: its answer may be there already, and then needs no place.
    """

    def __init__(self, app: ASGIApp, gate: Gate):
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 429, or 503 on the way out. The connection stays usable: what comes of the body is dropped."""
        asks = scope["type"] == "http" and scope["path"] in GENERATING and scope["method"] == "POST"
        if asks and all(name != b"idempotency-key" for name, _ in scope["headers"]):
            try:
                self.gate.check(1)
            except ApiError as error:
                await error.answer(scope, receive, send)
                return
        await self.app(scope, receive, send)
