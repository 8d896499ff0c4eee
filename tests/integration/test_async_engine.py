"""Many streams over one stepping thread: same texts, cancellation, errors, and a loop that stays free."""

import asyncio

import pytest
from engines import engine, plain, prompts

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.engine import Engine, EngineStopped

PROMPTS = prompts((5, 9, 14, 20))
COUNT = 16


def greedy(count=COUNT):
    return SamplingParams(max_tokens=count, temperature=0)


def test_streams_side_by_side():
    async def main():
        async with Engine(engine("draft_model", pages=30)) as served:
            ticks = 0

            async def heart():
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.001)
                    ticks += 1

            beating = asyncio.create_task(heart())
            results = await asyncio.gather(*(served.generate(prompt, greedy()) for prompt in PROMPTS))
            beating.cancel()
            assert ticks > 2
            assert [result.token_ids for result in results] == [plain(prompt, COUNT) for prompt in PROMPTS]
            assert all(result.finish_reason == "length" for result in results)

    asyncio.run(main())


def test_leaving_a_stream_cancels_its_request_only():
    async def main():
        core = engine("ngram")
        async with Engine(core) as served:
            other = asyncio.create_task(served.generate(PROMPTS[1], greedy(40)))
            stream = served.stream(PROMPTS[0], greedy(100))
            async for commit in stream:
                assert commit.finish_reason is None
                break
            await stream.aclose()
            task = asyncio.create_task(served.generate(PROMPTS[2], greedy(100)))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await other).token_ids == plain(PROMPTS[1], 40)
            last = await served.generate(PROMPTS[3], greedy(1))
            assert len(last.token_ids) == 1
        assert core.idle
        core.check_integrity()

    asyncio.run(main())


def test_bad_requests_are_refused_and_the_rest_goes_on():
    async def main():
        async with Engine(engine()) as served:
            for prompt, params, words in (([], None, "empty"), ([1], SamplingParams(stop=["x"]), "stop 'x'")):
                with pytest.raises(UserError, match=words):
                    await served.generate(prompt, params)
            assert len((await served.generate(PROMPTS[0], greedy())).token_ids) == COUNT

    asyncio.run(main())


def test_closing_ends_open_streams():
    async def main():
        core = engine()
        served = Engine(core)
        tasks = [asyncio.create_task(served.generate(prompt, greedy(100))) for prompt in PROMPTS]
        await asyncio.sleep(0.02)
        await asyncio.to_thread(served.close)
        for task in tasks:
            with pytest.raises(EngineStopped):
                await task
        with pytest.raises(EngineStopped, match="closed"):
            await served.generate(PROMPTS[0], greedy())
        assert core.idle

    asyncio.run(main())


def test_a_failing_step_reaches_every_stream():
    async def main():
        core = engine()

        def explode(*_):
            raise MemoryError("no more")

        core.target = core.runner.target = type("Broken", (), {"forward": explode, "device": core.target.device})()
        served = Engine(core)
        with pytest.raises(EngineStopped, match="no more"):
            await served.generate(PROMPTS[0], greedy())
        with pytest.raises(EngineStopped):
            await served.generate(PROMPTS[1], greedy())
        served.close()

    asyncio.run(main())
