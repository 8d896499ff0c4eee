"""What keeps a server standing: keys, the size and the slowness of bodies, and how many texts are in it at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.common.errors import UserError
from dspark.server.errors import ApiError

KEY_VARIABLE = "DSPARK_API_KEYS"
OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})  # what probes and scrapers read, without a key
REMEMBERED = 32  # finished requests from which the wait of a refused one is guessed
LONGEST_WAIT = 60
CLOSE = {"Connection": "close"}


def find_keys(given: Iterable[str] = (), file: Path | None = None) -> list[str]:
    """The keys from the command line, a file (one a line, # comments) and the environment (by commas)."""
    keys = [*given, *os.environ.get(KEY_VARIABLE, "").split(",")]
    if file is not None:
        try:
            keys += [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the API keys in {file}: {error}; pass a UTF-8 file, one key a line"
            ) from error
    found = [key.strip() for key in keys if key.strip()]
    if file is not None and not found:
        raise UserError(f"{file} has no API key; write one a line, or leave it out to serve without keys")
    return found


class Keys:
    """Lets requests through that bring one of the keys, compared in a time that tells nothing about them."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], free: Iterable[str] = ()):
        """`free` are paths that need no key, beside OPEN."""
        self.app = app
        self._free = OPEN | frozenset(free)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 without a key."""
        if scope["type"] == "http" and scope["path"] not in self._free and not self.allow(scope):
            await ApiError(
                401,
                "this server needs an API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            ).response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def allow(self, scope: Scope) -> bool:
        """Whether the request may pass."""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        fits = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == b"bearer" and any(fits)


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
            body = await asyncio.wait_for(self._read(receive), self.seconds)
        except TimeoutError:
            late = ApiError(408, f"the body took more than {self.seconds:g} s; send it faster", headers=CLOSE)
            await late.response(scope, receive, send)
            return
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if body is None:
            return  # the client went away: there is nobody to answer
        unread: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return unread.popleft() if unread else await receive()

        await self.app(scope, replay, send)

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
                return bytes(body)


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
