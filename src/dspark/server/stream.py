"""Answers that take time: while one is made its client is watched, and one that leaves is not worked for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.server.answers import Form, Piece, Usage
from dspark.server.errors import ClientGone, as_api_error

Answer = TypeVar("Answer")
DONE = b"data: [DONE]\n\n"


async def while_listening(receive: Receive, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled when the client goes. Raises ClientGone then."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


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
        first: Piece,
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
        self._first, self._pieces, self._form = first, pieces, form
        self._choices, self._usage, self._left = choices, usage, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write all events; leaving early ends the work."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_listening(receive, self._write(send))
        except ClientGone:
            self._left()
        finally:
            await self._pieces.aclose()

    async def _write(self, send: Callable[[Any], Awaitable[None]]) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        extra = {} if self._usage is None else {"usage": None}  # OpenAI's way to say that it will come
        try:
            start = b"".join(event(one | extra) for one in self._form.head(self._choices))
            await body(start + event(self._form.chunk(self._first) | extra))
            async for piece in self._pieces:
                if (
                    piece.text or piece.logprobs or piece.trace or piece.finish_reason
                ):  # a stop string may hold text back
                    await body(event(self._form.chunk(piece) | extra))
        except Exception as error:
            await body(event(as_api_error(error).body), more=False)
            return
        end = b"" if self._usage is None else event(self._form.usage(self._usage))
        await body(end + DONE, more=False)
