"""When commits go to their callers: firsts and lasts at once, the rest at a pace, always in order."""

import asyncio

import pytest

from dspark.engine import delivery
from dspark.engine.delivery import Delivery, Stream
from dspark.engine.request import Commit, RequestStatistics


def commit(number, last=False):
    return Commit(0, [number], str(number), 0, None, "length" if last else None, RequestStatistics())


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(delivery.time, "monotonic", lambda: Clock.now)
    return Clock


async def arrived(stream):
    """What the caller can take now, None if it is not woken."""
    await asyncio.sleep(0)
    if not stream._ready.is_set():
        return None
    placed, error = await stream.take()
    return [one.token_ids[0] for _, one in placed], error


def run(main):
    async def inside():
        await main(Delivery(0.02), [Stream(asyncio.get_running_loop()) for _ in range(2)])

    asyncio.run(inside())


def test_between_the_first_and_the_last_they_come_together(clock):
    async def main(sending, streams):
        first, _ = streams
        told = []
        for step in range(12):  # steps of 6 ms
            sending.put(first, (0, commit(step, last=step == 11)))
            sending.send()
            told.append(await arrived(first))
            clock.now += 0.006
        assert [one and one[0] for one in told] == [
            *([0], None, None, None),
            *([1, 2, 3, 4], None, None, None),
            *([5, 6, 7, 8], None, None, [9, 10, 11]),
        ]

    run(main)


def test_slow_steps_are_sent_each_by_itself(clock):
    async def main(sending, streams):
        for step in range(4):
            sending.put(streams[0], (0, commit(step)))
            sending.send()
            assert await arrived(streams[0]) == ([step], None)
            clock.now += 0.02

    run(main)


def test_what_is_urgent_for_one_does_not_hurry_another(clock):
    async def main(sending, streams):
        first, second = streams
        for step in range(2):
            sending.put(first, (0, commit(step)))
            sending.send()
        assert await arrived(first) == ([0], None)
        sending.put(second, (0, commit(7, last=True)))
        sending.send()
        assert await arrived(second) == ([7], None) and await arrived(first) is None
        sending.send(everything=True)
        assert await arrived(first) == ([1], None)

    run(main)


def test_an_error_ends_a_stream_after_what_came_before_it(clock):
    async def main(sending, streams):
        first, second = streams
        failure = RuntimeError()
        for item in ((0, commit(0)), (0, commit(1)), failure, (0, commit(2))):
            sending.put(first, item)
        sending.put(second, (0, commit(3)))
        sending.drop(second)
        sending.send(everything=True)
        assert await arrived(first) == ([0, 1], failure)
        assert await arrived(second) is None

    run(main)
