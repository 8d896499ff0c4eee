"""API keys: where they come from, what each may use, and the middleware that lets their holders in."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from dspark.common.errors import UserError
from dspark.server.calls import call_of
from dspark.server.errors import ApiError
from dspark.server.rates import Account, Rates

KEY_VARIABLE = "DSPARK_API_KEYS"
OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})  # what probes and scrapers read, without a key
OPTIONS = ("name", "requests-per-minute", "tokens-per-minute")


@dataclass(frozen=True)
class ApiKey:
    """One key: its digest, the name that logs show, and what its holder may use."""

    digest: bytes
    name: str
    rates: Rates

    @staticmethod
    def parse(line: str, default: Rates | None = None) -> ApiKey:
        """`KEY [name=ALICE] [requests-per-minute=60] [tokens-per-minute=100000]`, a line of a key file.

        What the line does not say is as in `default`; without a name, logs show the start of the key's hash.
        Raises UserError without repeating the key.
        """
        secret, *options = line.split()
        digest = hashlib.sha256(secret.encode()).digest()
        given: dict[str, str] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in OPTIONS or not value:
                raise UserError(
                    f"an API key is followed by {option!r}; pass {', '.join(f'{o}=VALUE' for o in OPTIONS)}"
                )
            given[name] = value
        name = given.get("name", digest.hex()[:8])
        if not re.fullmatch(r"[\w.@-]{1,64}", name):
            raise UserError(f"the name {name!r:.80} of an API key is not 1 to 64 letters, digits or . _ @ -")
        return ApiKey(digest, name, (default or Rates()).but(given))


def find_keys(given: Iterable[str] = (), file: Path | None = None) -> list[str]:
    """The keys, as ApiKey.parse takes them: from the command line, a file (one a line, # comments), the environment."""
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
    """Lets requests through that bring one of the keys, compared in a time that tells nothing about them.

    Without keys everybody comes in, on one account.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], rates: Rates, free: Iterable[str] = ()):
        """`rates` are everybody's where there are no keys; `free` are paths that need none, beside OPEN."""
        self.app = app
        self._free = OPEN | frozenset(free)
        self.keys = keys
        self._accounts = [Account(key.rates) for key in keys]
        self._everybody = Account(rates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 without a key, 429 to one that has sent too many requests."""
        if scope["type"] == "http" and scope["path"] not in self._free:
            try:
                account = self._enter(scope)
                call_of(scope).account = account
                if scope["method"] == "POST":
                    account.take_request()
            except ApiError as error:
                await error.answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _enter(self, scope: Scope) -> Account:
        if not self.keys:
            return self._everybody
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, secret = header.partition(b" ")
        digest = hashlib.sha256(secret.strip()).digest()
        fits = [hmac.compare_digest(digest, key.digest) for key in self.keys]  # all of them, always
        if scheme.lower() != b"bearer" or not any(fits):
            raise ApiError(
                401,
                "this server needs an API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        place = fits.index(True)
        call, key = call_of(scope), self.keys[place]
        call.key, call.owner = key.name, key.digest.hex()
        return self._accounts[place]
