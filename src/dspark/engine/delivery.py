"""Brings commits from the engine's thread to the event loops of those who wait for them.

What begins or ends a text is sent after its step, what lies between once in a while with all that came since. Waking a
loop, and all that follows on a commit's way to its client, costs the same for one token as for ten, and is paid on the
cores that the engine computes on: so the while is `pace` seconds at least, and grows with what the loop took the last
time until sending takes SHARE of a core, or the while is LONGEST. Where steps take longer, each is sent by itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from dspark.engine.request import Commit

SHARE = 0.02  # of one core, for sending what lies between the ends of texts
LONGEST = 0.1  # s; ten events a second read like writing

Placed = tuple[int, Commit]  # a commit and the place of its prompt


@dataclass
class Parcel:
    """What is on its way to one stream."""

    commits: list[Placed] = field(default_factory=list)
    finished: int = 0  # texts whose last commit is here
    error: BaseException | None = None  # which ended the stream after these


class Stream:
    """One caller's end, on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.open: dict[int, int] = {}  # request id: the place of its prompt
        self.begun = False  # something was sent already
        self._here = Parcel()
        self._ready = asyncio.Event()

    def put(self, parcel: Parcel) -> None:
        """Wake the caller with what came."""
        here = self._here
        if here.error is None:
            here.commits += parcel.commits
            here.finished += parcel.finished
            here.error = parcel.error
        self._ready.set()

    async def take(self) -> Parcel:
        """What came since the last time, at least one commit or an error."""
        await self._ready.wait()
        self._ready.clear()
        here, self._here = self._here, Parcel()
        return here


class Delivery:
    """The engine's end: keeps what is on its way to streams. For the engine's thread alone."""

    def __init__(self, pace: float):
        """`pace` 0 sends every commit after its step, whatever that takes."""
        self.pace = pace
        self._taken = 0.0  # s of processor time, by a loop for the last sending of everything; written by the loop
        self._kept: dict[Stream, Parcel] = {}
        self._urgent: dict[Stream, None] = {}
        self._next = 0.0

    def put(self, stream: Stream, place: int, commit: Commit) -> None:
        """Keep a commit for the next `send`."""
        parcel = self._parcel(stream)
        if parcel.error is not None:
            return
        parcel.commits.append((place, commit))
        if commit.finish_reason or not stream.begun:
            parcel.finished += commit.finish_reason is not None
            stream.begun = True
            self._urgent[stream] = None

    def end(self, stream: Stream, error: BaseException) -> None:
        """An error after what was kept; nothing comes behind it."""
        self._parcel(stream).error = error
        self._urgent[stream] = None

    def _parcel(self, stream: Stream) -> Parcel:
        parcel = self._kept.get(stream)
        if parcel is None:
            parcel = self._kept[stream] = Parcel()
        return parcel

    def drop(self, stream: Stream) -> None:
        """Nobody waits for it any more."""
        self._kept.pop(stream, None)
        self._urgent.pop(stream, None)

    def send(self, *, everything: bool = False) -> None:
        """Send what is urgent, and all the rest as well if it is time; one wake-up of each loop that is concerned."""
        whole = everything or time.monotonic() >= self._next
        if whole:
            sent, self._kept = self._kept, {}
            self._next = time.monotonic() + self.wait
        else:
            sent = {stream: self._kept.pop(stream) for stream in self._urgent}
        self._urgent.clear()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Parcel]]] = {}
        for stream, parcel in sent.items():
            by_loop.setdefault(stream.loop, []).append((stream, parcel))
        for loop, addressed in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._arrive, loop, addressed, whole)

    @property
    def wait(self) -> float:
        """Seconds from one sending of everything to the next."""
        return max(self.pace, min(self._taken / SHARE, LONGEST)) if self.pace else 0.0

    def _arrive(self, loop: asyncio.AbstractEventLoop, addressed: list[tuple[Stream, Parcel]], whole: bool) -> None:
        began = time.thread_time()
        for stream, parcel in addressed:
            stream.put(parcel)
        if whole:
            loop.call_soon(self._over, began)  # stands in the queue behind all who were just woken

    def _over(self, began: float) -> None:
        self._taken = time.thread_time() - began
