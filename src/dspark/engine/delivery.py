"""Brings commits from the engine's thread to the event loops of those who wait for them.

What begins or ends a text is sent after its step, what lies between once every `pace` seconds with all that came since.
Where steps take longer than that, each is sent by itself. Waking a loop, and all that follows on a commit's way to its
client, costs the same for one token as for ten, and is paid on the cores that the engine computes on.
"""

from __future__ import annotations

import asyncio
import time

from dspark.engine.request import Commit

Placed = tuple[int, Commit]  # a commit and the place of its prompt
Item = Placed | BaseException


class Stream:
    """One caller's end, on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.open: dict[int, int] = {}  # request id: the place of its prompt
        self.begun = False  # something was sent already
        self._items: list[Item] = []
        self._ready = asyncio.Event()

    def put(self, items: list[Item]) -> None:
        """Wake the caller with `items`."""
        self._items += items
        self._ready.set()

    async def take(self) -> tuple[list[Placed], BaseException | None]:
        """What came since the last time, at least one item, and what ended it, if something did."""
        await self._ready.wait()
        self._ready.clear()
        items, self._items = self._items, []
        found: list[Placed] = []
        for item in items:
            if isinstance(item, BaseException):
                return found, item
            found.append(item)
        return found, None


class Delivery:
    """The engine's end: keeps what is on its way to streams. For the engine's thread alone."""

    def __init__(self, pace: float):
        self.pace = pace
        self._kept: dict[Stream, list[Item]] = {}
        self._urgent: dict[Stream, None] = {}
        self._next = 0.0

    def put(self, stream: Stream, item: Item) -> None:
        """Keep an item for the next `send`."""
        self._kept.setdefault(stream, []).append(item)
        if not stream.begun or isinstance(item, BaseException) or item[1].finish_reason:
            stream.begun = True
            self._urgent[stream] = None

    def drop(self, stream: Stream) -> None:
        """Nobody waits for it any more."""
        self._kept.pop(stream, None)
        self._urgent.pop(stream, None)

    def send(self, *, everything: bool = False) -> None:
        """Send what is urgent, and all the rest as well if it is time; one wake-up of each loop that is concerned."""
        if everything or time.monotonic() >= self._next:
            sent, self._kept = self._kept, {}
            self._next = time.monotonic() + self.pace
        else:
            sent = {stream: self._kept.pop(stream) for stream in self._urgent}
        self._urgent.clear()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, list[Item]]]] = {}
        for stream, items in sent.items():
            by_loop.setdefault(stream.loop, []).append((stream, items))
        for loop, addressed in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_arrive, addressed)


def _arrive(addressed: list[tuple[Stream, list[Item]]]) -> None:
    for stream, items in addressed:
        stream.put(items)
