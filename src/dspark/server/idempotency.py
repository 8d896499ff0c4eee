"""`Idempotency-Key`: a request sent again gets the answer it had, without another text being generated."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.server.calls import call_of
from dspark.server.errors import LOG, ApiError, as_api_error
from dspark.server.limits import GENERATING, read_again
from dspark.server.results import Busy, Kept, Results
from dspark.server.stream import DONE, listening

GIVEN = re.compile(rb"[\x20-\x7e]{1,255}")
MOST_WAITING = 1024  # repetitions that wait for the first of their key
LOOK_SECONDS = 0.1  # between two looks at what another server is making
STREAM = "text/event-stream"


@dataclass
class _Making:
    fingerprint: str
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Idempotency:
    """Keeps whole answers of 200, of each API key apart; a stream is replayed event by event as it was.

    An answer is kept before its last byte is sent, so that a client that has seen its end will get it again.
    """

    def __init__(self, app: ASGIApp, results: Results, *, most_bytes: int, wait_seconds: float | None):
        """`most_bytes` of one answer: a larger one is not kept. A repetition waits `wait_seconds` for the first."""
        self.app, self.results = app, results
        self.most_bytes, self.wait_seconds = most_bytes, wait_seconds
        self._making: dict[str, _Making] = {}
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 422 to a key that came with another request, else passes on or replays."""
        given = dict(scope["headers"]).get(b"idempotency-key") if scope["type"] == "http" else None
        if given is None or scope["method"] != "POST" or scope["path"] not in GENERATING:
            await self.app(scope, receive, send)
            return
        body = (await receive()).get("body", b"")  # whole: Bodies has read it
        fingerprint = hashlib.sha256(scope["path"].encode() + b"\0" + body).hexdigest()
        try:
            if not GIVEN.fullmatch(given):
                raise ApiError(400, "the Idempotency-Key is not 1 to 255 printable ASCII characters; pass a UUID")
            key = hashlib.sha256(f"{call_of(scope).owner}\0".encode() + given).hexdigest()
            async with listening(receive):
                kept = await self._begin(key, fingerprint)
        except Exception as error:
            await as_api_error(error).answer(scope, receive, send)
            return
        if kept is not None:
            call_of(scope).replayed = True
            headers = {"Cache-Control": "no-cache", "Idempotent-Replayed": "true", "Content-Type": kept.media_type}
            await Response(kept.body, kept.status, headers)(scope, receive, send)
            return
        recorder = _Recorder(self, key, fingerprint, send)
        try:
            await self.app(scope, read_again(body, receive), recorder.send)
        finally:
            if not recorder.kept:
                await self._end(key, fingerprint)
            self._making.pop(key).over.set()

    async def _begin(self, key: str, fingerprint: str) -> Kept | None:
        """The answer once there is one; None when this request is to make it."""
        try:
            async with asyncio.timeout(self.wait_seconds):
                while True:
                    if (making := self._making.get(key)) is not None:
                        _same(making.fingerprint, fingerprint)
                        await self._wait(making)
                        continue
                    self._making[key] = making = _Making(fingerprint)
                    found: Kept | Busy | None = Busy(fingerprint)
                    try:
                        found = await self.results.begin(key, fingerprint)
                        if found is None:
                            return None
                        _same(found.fingerprint, fingerprint)
                    finally:
                        if found is not None:
                            self._making.pop(key).over.set()
                    if isinstance(found, Kept):
                        return found
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError as error:
            raise ApiError(
                504, "the first request of this key is not done; ask later", code="deadline_exceeded"
            ) from error

    async def _wait(self, making: _Making) -> None:
        if self._waiting >= MOST_WAITING:
            raise ApiError(429, "too many requests wait for the first of their key", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            await making.over.wait()
        finally:
            self._waiting -= 1

    async def _end(self, key: str, fingerprint: str) -> None:
        try:
            await self.results.release(key, fingerprint)
        except Exception as error:
            LOG.error("an idempotency key could not be released; it runs out by itself", exc_info=error)


class _Recorder:
    """Passes an answer on and keeps it."""

    def __init__(self, owner: Idempotency, key: str, fingerprint: str, send: Send):
        self._owner, self._key, self._fingerprint, self._send = owner, key, fingerprint, send
        self._status, self._media_type = 0, ""
        self._body: bytearray | None = bytearray()
        self.kept = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._media_type = dict(message["headers"]).get(b"content-type", b"").decode()
        elif message["type"] == "http.response.body" and self._body is not None:
            self._body += message.get("body", b"")
            if len(self._body) > self._owner.most_bytes or self._status != 200:
                self._body = None
            elif not message.get("more_body"):
                await self._keep(bytes(self._body))
        await self._send(message)

    async def _keep(self, body: bytes) -> None:
        if self._media_type.startswith(STREAM) and not body.endswith(DONE):
            return  # it ended with an error
        try:
            kept = Kept(self._fingerprint, self._status, self._media_type, body)
            await self._owner.results.keep(self._key, kept)
            self.kept = True
        except Exception as error:  # the client has waited for its answer and shall have it
            LOG.error("an answer could not be kept for its idempotency key", exc_info=error)


def _same(known: str, given: str) -> None:
    if known != given:
        raise ApiError(
            422, "this Idempotency-Key came with another request before; use a new one", code="idempotency_key_reused"
        )
