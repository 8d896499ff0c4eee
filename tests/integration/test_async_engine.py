"""Many streams over one stepping thread: same texts, cancellation, errors, and a loop that stays free."""

import asyncio
import threading
import time

import pytest
import torch
from engines import engine, plain, prompts, run

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.engine import Engine, EngineStopped, StepFailed

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


def test_a_failing_step_ends_those_in_it_and_the_engine_goes_on():
    async def main():
        core = engine("dspark", max_running=2)
        forward, steps = core.runner.forward, []

        def forward_of_a_bad_day(step):
            steps.append(step)
            while len(steps) == 1 and len(core.requests) + len(served._commands) < 3:
                time.sleep(0.001)
            if len(steps) == 4:  # two are in it, the third waits
                for keys in core.runner.pool.keys:
                    keys.fill_(float("nan"))  # attention would read it behind the end of a text
                raise FloatingPointError("not numbers")
            return forward(step)

        core.runner.forward = forward_of_a_bad_day
        async with Engine(core) as served:
            asked = [served.generate(prompt, greedy(100)) for prompt in PROMPTS[:3]]
            results = await asyncio.gather(*asked, return_exceptions=True)
            failed = [result for result in results if isinstance(result, StepFailed)]
            assert len(failed) == 2 and all("not numbers" in str(error) for error in failed)
            (whole,) = (index for index, result in enumerate(results) if not isinstance(result, StepFailed))
            assert results[whole].token_ids == plain(PROMPTS[whole], 100)
            assert (await served.generate(PROMPTS[3], greedy())).token_ids == plain(PROMPTS[3], COUNT)
            assert served.failed_steps == 1 and served.stopped is None
            await served.ask(lambda core: core.check_integrity())
        assert core.idle

    asyncio.run(main())


LAWS = {
    "greedy": {"temperature": 0},
    "rejection": {"temperature": 1, "acceptance": "rejection", "seed": 5},
    "coupled": {"temperature": 1, "seed": 5},
    "penalized": {"temperature": 0, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["none", "dspark"])
def test_a_request_whose_logits_are_no_numbers_fails_alone(law, kind):
    fields = LAWS[law] | {"max_tokens": 40}
    whole = run(engine(kind, max_running=3), PROMPTS[:3], **fields)

    async def main():
        core = engine(kind, max_running=3)
        forward, steps = core.runner.forward, []

        @torch.inference_mode()
        def poisoned(step):
            logits, taps = forward(step)
            if not steps and len(core.admission.running) == 3 and core.admission.running[2].output_length > 2:
                steps.append(step)
                bad = core.admission.running[1]
                hit = torch.isin(step.batch.slot_T // core.config.page_size, torch.tensor(bad.pages))
                logits[hit[step.rows_B], 0] = float("nan")  # one entry of each of its rows
                for pool in (core.runner.pool.keys, core.runner.pool.values):
                    pool[0][step.batch.slot_T[hit]] = float("nan")
            return logits, taps

        core.runner.forward = poisoned
        async with Engine(core) as served:
            asked = [served.generate(prompt, SamplingParams(**fields)) for prompt in PROMPTS[:3]]
            results = await asyncio.gather(*asked, return_exceptions=True)
            (failed,) = (result for result in results if isinstance(result, BaseException))
            assert isinstance(failed, StepFailed) and "not numbers" in str(failed)
            told = [result.token_ids for result in results if not isinstance(result, StepFailed)]
            if law != "rejection":  # whose text depends on how many rounds its drafts took
                assert told == [whole[i] for i, result in enumerate(results) if not isinstance(result, StepFailed)]
            again = await served.generate(PROMPTS[0], greedy())
            assert again.token_ids == plain(PROMPTS[0], COUNT) and served.failed_steps == 1
            await served.ask(lambda core: core.check_integrity())

    asyncio.run(main())


def test_an_engine_whose_device_is_gone_stops():
    async def main():
        core = engine()

        def gone(*_):
            raise RuntimeError("the device is lost")

        core.runner.forward = core.runner.clear = gone
        served = Engine(core)
        with pytest.raises((StepFailed, EngineStopped), match="lost"):
            await served.generate(PROMPTS[0], greedy())
        with pytest.raises(EngineStopped):
            await served.generate(PROMPTS[1], greedy())
        assert "lost" in str(served.stopped)
        served.close()

    asyncio.run(main())


def test_prompts_that_belong_together_share_a_stream_and_an_error():
    async def main():
        core = engine("ngram")
        async with Engine(core) as served:
            texts = [[], []]
            async for place, commit in served.streams([(PROMPTS[0], greedy()), (PROMPTS[1], greedy(5))]):
                texts[place] += commit.token_ids
            assert texts == [plain(PROMPTS[0], COUNT), plain(PROMPTS[1], 5)]
            with pytest.raises(UserError, match="stop 'x'"):
                async for _ in served.streams([(PROMPTS[0], greedy()), (PROMPTS[1], SamplingParams(stop=["x"]))]):
                    raise AssertionError("the first was served")
        assert core.idle

    asyncio.run(main())


def test_the_builders_threads_are_released(monkeypatch):
    released = []
    monkeypatch.setattr("dspark.engine.engine.release_team", lambda: released.append(threading.current_thread()))
    Engine(engine()).close()
    assert released == [threading.current_thread()]


@pytest.mark.parametrize(("longest", "sizes"), [(0.0, [1, 5, 24]), (3600.0, [1, 29])])
def test_what_waits_for_its_time_is_told_before_a_long_step_with_a_prompt(monkeypatch, longest, sizes):
    """With a pace that never comes: the first commit, what is there when a prompt comes in, the rest with the last."""
    monkeypatch.setattr("dspark.engine.engine.LONGEST", longest)  # so a step with a prompt takes longer, or never

    async def main():
        core = engine("none")
        doors, forward = {5: threading.Event(), 10: threading.Event()}, core.runner.forward

        def held(step):
            if core.timings.steps in doors:
                assert doors[core.timings.steps].wait(60)
            return forward(step)

        core.runner.forward = held
        async with Engine(core, pace=3600.0) as served:
            told, other = [], None
            async for batch in served.batches([(PROMPTS[0], greedy(30))]):
                told.append([token for _, commit in batch for token in commit.token_ids])
                if other is None:
                    while core.timings.steps < 5:
                        await asyncio.sleep(0.001)
                    other = asyncio.create_task(served.generate(PROMPTS[1], greedy(5)))
                    await asyncio.sleep(0)  # it is asked for while the sixth step is held
                    doors[5].set()
                if len(told) == len(sizes) - 1:
                    doors[10].set()
            await other
            assert [len(batch) for batch in told] == sizes
            assert [token for batch in told for token in batch] == plain(PROMPTS[0], 30)

    asyncio.run(main())
