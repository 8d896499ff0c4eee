"""Connections that do not wait for ever: for a request that does not come, or an answer that is not read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as Protocol

HEAD_SECONDS = 15.0  # for the head of a request, from its first byte or the opening of the connection
MOST_IDLE_BYTES = 4 << 20  # that may come while no request is served: a head, or a body that was refused unread
READ_SECONDS = 60.0  # in which a client whose buffers are full must read some of its answer


class PatientProtocol(Protocol):
    """uvicorn's connection with two more time limits; uvicorn's own is for the time between two requests."""

    head_seconds = HEAD_SECONDS
    read_seconds = READ_SECONDS
    _head: asyncio.TimerHandle | None = None
    _read: asyncio.TimerHandle | None = None
    _idle_bytes = 0

    @classmethod
    def within(cls, *, head: float, read: float) -> type[PatientProtocol]:
        """The same with other limits, in seconds."""
        return type(cls.__name__, (cls,), {"head_seconds": head, "read_seconds": read})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request has to come."""
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        """A request that has begun is timed by what serves it."""
        super().data_received(data)
        self._idle_bytes = 0 if self._serving else self._idle_bytes + len(data)
        if self._idle_bytes > MOST_IDLE_BYTES:
            self._abort()
        self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._head = _ended(self._head)
        self._read = _ended(self._read)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client's buffers are full."""
        super().pause_writing()
        self._read = _ended(self._read)
        self._read = self.loop.call_later(self.read_seconds, self._abort)

    def resume_writing(self) -> None:
        """It reads."""
        self._read = _ended(self._read)
        super().resume_writing()

    @property
    def _serving(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _expect_a_head(self) -> None:
        if self._serving:
            self._head = _ended(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head = None
        if not self._serving:
            self._abort()

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
