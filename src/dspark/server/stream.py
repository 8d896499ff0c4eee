"""Answers that take time: while one is made its client is watched, and one that leaves is not worked for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.server.answers import Form, Piece, Usage
from dspark.server.errors import ClientGone, as_api_error

DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def listening(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs in the context when the client goes. Raises ClientGone then."""
    inside = True

    def gone(listener: asyncio.Task[None]) -> None:
        if inside and not listener.cancelled():
            limit.reschedule(0.0)

    listener = asyncio.ensure_future(_gone(receive))
    try:
        async with asyncio.timeout(None) as limit:  # which knows our cancellation from another's
            listener.add_done_callback(gone)
            try:
                yield
            finally:
                inside = False
    except TimeoutError:
        if limit.expired():
            raise ClientGone from None
        raise
    finally:
        listener.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Pieces as server-sent events, each as soon as the engine sends it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[Piece, None],
        form: Form,
        *,
        choices: int,
        usage: Usage | None,
        left: Callable[[], None],
    ):
        """`usage` is told at the end unless it is None; `left` is called if the client goes before it."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._form, self._choices, self._usage, self._left = pieces, form, choices, usage, left
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write all events; leaving early ends the work. What goes wrong before the first of them is raised."""
        try:
            async with listening(receive):
                await self._write(send)
        except ClientGone:
            self._left()
            if not self._begun:
                raise
        finally:
            await self._pieces.aclose()

    async def _write(self, send: Send) -> None:
        """Each send is a system call, and wakes the client: what is said at one time is sent in one."""

        async def body(data: bytes, more: bool = True) -> None:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        extra = {} if self._usage is None else {"usage": None}  # OpenAI's way to say that it will come
        unsent = b"".join([event(one | extra) for one in self._form.head(self._choices)])
        unfinished = self._choices
        try:
            async for piece in self._pieces:
                if piece.text or piece.logprobs or piece.trace or piece.finish_reason or not self._begun:
                    unsent += event(self._form.chunk(piece) | extra)  # a stop string may hold text back
                unfinished -= piece.finish_reason is not None
                if unsent and unfinished:
                    await body(unsent)
                    unsent = b""
        except Exception as error:
            if not self._begun:
                raise
            await body(unsent + event(as_api_error(error).body), more=False)
            return
        end = b"" if self._usage is None else event(self._form.usage(self._usage))
        await body(unsent + end + DONE, more=False)
