"""Rate limits of one API key: token buckets over requests and over tokens, told as OpenAI tells them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dspark.common.errors import UserError
from dspark.server.errors import ApiError

Clock = Callable[[], float]


@dataclass(frozen=True)
class Rates:
    """What one key may use, per minute; None is without limit."""

    requests: int | None = None
    tokens: int | None = None  # of prompts and of answers

    def __post_init__(self) -> None:
        for name in ("requests", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{value} {name} per minute let nobody in; pass 1 or more, or leave the limit out")

    def but(self, given: Mapping[str, str]) -> Rates:
        """These rates with `requests-per-minute` and `tokens-per-minute` of `given` in place of their own."""
        changed = {}
        for name in ("requests", "tokens"):
            value = given.get(f"{name}-per-minute")
            if value is not None:
                if not (value.isascii() and value.isdecimal() and len(value) < 16):
                    raise UserError(f"{name}-per-minute={value} is not a whole number; pass one, such as 60")
                changed[name] = int(value)
        return replace(self, **changed)


class Bucket:
    """Holds one minute's worth and refills evenly. A level below 0 is a debt."""

    def __init__(self, per_minute: int, clock: Clock):
        self.size = per_minute
        self._clock, self._level, self._read = clock, float(per_minute), clock()

    @property
    def level(self) -> float:
        """What can be taken now."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._read) * self.size / 60)
        self._read = now
        return self._level

    def take(self, amount: float) -> float:
        """0 if `amount` was taken, else the seconds until it can be."""
        missing = amount - self.level
        if missing > 0:
            return missing * 60 / self.size
        self._level -= amount
        return 0.0

    def give(self, amount: float) -> None:
        """Put back what was not needed; a negative amount is what was needed beyond."""
        self._level = min(self.size, self.level + amount)

    @property
    def seconds_to_full(self) -> float:
        """Until it holds a whole minute's worth again."""
        return (self.size - self.level) * 60 / self.size


class Account:
    """What one key has used."""

    def __init__(self, rates: Rates, clock: Clock = time.monotonic):
        self.buckets = {
            kind: Bucket(limit, clock)
            for kind, limit in (("requests", rates.requests), ("tokens", rates.tokens))
            if limit is not None
        }

    def take_request(self) -> None:
        """Count one request. Raises ApiError 429."""
        self._take("requests", 1)

    def reserve(self, tokens: int) -> int:
        """Set tokens aside for a request that may need so many; how many were. Raises ApiError 429.

        A request that may need more than a minute's worth is let in with a full bucket: it could never run otherwise.
        """
        bucket = self.buckets.get("tokens")
        if bucket is None:
            return 0
        wanted = min(tokens, bucket.size)
        self._take("tokens", wanted)
        return wanted

    def settle(self, reserved: int, used: int) -> None:
        """Give back what a request had set aside and did not use."""
        if "tokens" in self.buckets:
            self.buckets["tokens"].give(reserved - used)

    def _take(self, kind: str, amount: int) -> None:
        bucket = self.buckets.get(kind)
        seconds = bucket.take(amount) if bucket is not None else 0.0
        if bucket is not None and seconds:
            raise ApiError(
                429,
                f"this key's {bucket.size} {kind} per minute are used up; try again in {math.ceil(seconds)} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(seconds))},
            )

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*`: limit, what remains, and the time to a full bucket."""
        told = {}
        for kind, bucket in self.buckets.items():
            told[f"x-ratelimit-limit-{kind}"] = str(bucket.size)
            told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_to_full)
        return told


def duration(seconds: float) -> str:
    """As OpenAI writes one: 350ms, 12s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
