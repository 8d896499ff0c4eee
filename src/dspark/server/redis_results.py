"""Finished answers kept in Redis, for several servers that answer under one address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Awaitable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.server.errors import ApiError
from dspark.server.results import Busy, Kept

PREFIX = "dspark:answer:"
LEASE_SECONDS = 10.0  # a server that has died holds a key at most so long; one that lives renews it
CLAIM = b"?"
IF_MINE = "if redis.call('get', KEYS[1]) == ARGV[1] then return {} end return 0"
KEEP = IF_MINE.format("redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])")
RENEW = IF_MINE.format("redis.call('pexpire', KEYS[1], ARGV[2])")
RELEASE = IF_MINE.format("redis.call('del', KEYS[1])")
Answer = TypeVar("Answer")


class RedisResults:
    """One value a key: first the claim of the server that makes the answer, then the answer, each with its expiry."""

    def __init__(self, url: str, *, seconds: float, lease_seconds: float = LEASE_SECONDS):
        """Raises UserError where no Redis answers at `url`."""
        redis = require("redis", "redis")
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._where = urlsplit(url).hostname or url.partition("@")[2] or url  # without a password, for messages
        limits = {"socket_timeout": 5, "socket_connect_timeout": 5}
        try:
            with redis.from_url(url, **limits) as client:
                client.ping()
        except (*self._errors, ValueError) as error:
            raise UserError(
                f"no Redis answers at {self._where}: {error}; check the address of --idempotency"
            ) from error
        self._client: Any = redis.asyncio.from_url(url, **limits)
        self._seconds, self._lease = seconds, lease_seconds
        self._owner = secrets.token_hex(8)
        self._claims: dict[str, bytes] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def begin(self, key: str, fingerprint: str) -> Kept | Busy | None:
        """Claims the key where nobody has. Raises ApiError 503 where Redis does not answer, as all here."""
        claim = CLAIM + f"{fingerprint} {self._owner}".encode()
        while True:
            if await self._ask(self._client.set(PREFIX + key, claim, nx=True, px=_ms(self._lease))):
                self._claims[key] = claim
                if self._renewing is None:
                    self._renewing = asyncio.create_task(self._renew())
                return None
            value: bytes | None = await self._ask(self._client.get(PREFIX + key))
            if value is None:
                continue  # it expired in between
            if value.startswith(CLAIM):
                return Busy(value[1:].split()[0].decode())
            head, _, body = value.partition(b"\n")
            return Kept(**json.loads(head), body=body)

    async def keep(self, key: str, kept: Kept) -> None:
        """Does nothing for a claim that was lost, which takes a server that stood still longer than its lease."""
        head = {"fingerprint": kept.fingerprint, "status": kept.status, "media_type": kept.media_type}
        value = json.dumps(head).encode() + b"\n" + kept.body
        claim = self._claims.pop(key)
        await self._ask(self._client.eval(KEEP, 1, PREFIX + key, claim, value, _ms(self._seconds)))

    async def release(self, key: str, fingerprint: str) -> None:
        """Takes the claim back."""
        claim = self._claims.pop(key, None)
        if claim is not None:
            await self._ask(self._client.eval(RELEASE, 1, PREFIX + key, claim))

    async def close(self) -> None:
        """Claims that are left run out."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self._client.aclose()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            for key, claim in list(self._claims.items()):
                with contextlib.suppress(ApiError):  # the next round may reach it
                    await self._ask(self._client.eval(RENEW, 1, PREFIX + key, claim, _ms(self._lease)))

    async def _ask(self, question: Awaitable[Answer]) -> Answer:
        try:
            return await question
        except self._errors as error:
            raise ApiError(
                503,
                "the store of answers does not answer; send the request later, or without Idempotency-Key",
                code="idempotency_unavailable",
            ) from error


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
