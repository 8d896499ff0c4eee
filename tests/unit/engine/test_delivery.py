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
        busy = 0.0  # of the loop's thread

    monkeypatch.setattr(delivery.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(delivery.time, "thread_time", lambda: Clock.busy)
    return Clock


async def arrived(stream):
    """What the caller can take now, None if it is not woken."""
    await asyncio.sleep(0)
    if not stream._ready.is_set():
        return None
    parcel = await stream.take()
    assert parcel.finished == sum(one.finish_reason is not None for _, one in parcel.commits)
    return [one.token_ids[0] for _, one in parcel.commits], parcel.error


def run(main):
    async def inside():
        await main(Delivery(0.02), [Stream(asyncio.get_running_loop()) for _ in range(2)])

    asyncio.run(inside())


def test_between_the_first_and_the_last_they_come_together(clock):
    async def main(sending, streams):
        first, _ = streams
        told = []
        for step in range(12):  # steps of 6 ms
            sending.put(first, 0, commit(step, last=step == 11))
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
            sending.put(streams[0], 0, commit(step))
            sending.send()
            assert await arrived(streams[0]) == ([step], None)
            clock.now += 0.02

    run(main)


def test_what_is_urgent_for_one_does_not_hurry_another(clock):
    async def main(sending, streams):
        first, second = streams
        for step in range(2):
            sending.put(first, 0, commit(step))
            sending.send()
        assert await arrived(first) == ([0], None)
        sending.put(second, 0, commit(7, last=True))
        sending.send()
        assert await arrived(second) == ([7], None) and await arrived(first) is None
        sending.send(everything=True)
        assert await arrived(first) == ([1], None)

    run(main)


def test_an_error_ends_a_stream_after_what_came_before_it(clock):
    async def main(sending, streams):
        first, second = streams
        failure = RuntimeError()
        for number in range(2):
            sending.put(first, 0, commit(number))
        sending.end(first, failure)
        sending.put(first, 0, commit(2))
        sending.put(second, 0, commit(3))
        sending.drop(second)
        sending.send(everything=True)
        assert await arrived(first) == ([0, 1], failure)
        assert await arrived(second) is None

    run(main)


def test_what_takes_the_loop_long_is_sent_less_often(clock):
    """Sending takes 2 % of a core at most, and a stream waits a tenth of a second at most."""

    async def main(sending, streams):
        for busy, wait in ((0.0, 0.02), (0.0003, 0.02), (0.001, 0.05), (0.5, 0.1), (0.001, 0.05)):
            sending.put(streams[0], 0, commit(0))
            sending.send(everything=True)
            asyncio.get_running_loop().call_soon(lambda busy=busy: setattr(clock, "busy", clock.busy + busy))
            assert await arrived(streams[0])
            await asyncio.sleep(0)
            assert sending.wait == pytest.approx(wait)
        sending.pace = 0.0
        assert sending.wait == 0.0

    run(main)
