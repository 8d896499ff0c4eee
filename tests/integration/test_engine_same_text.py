"""Where the text is a function of prompt and seed, nothing an engine does may change it."""

import functools

import pytest
from engines import DRAFTERS, engine, plain, prompts, run

from dspark.common.sampling_params import SamplingParams

PLANNERS = ("none", "full", "fixed:2", "threshold:0.4")
PROMPTS = prompts((3, 17, 9, 22, 1))
COUNT = 15


@functools.cache
def wanted():
    return [plain(prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_temperature_0_is_the_librarys_greedy_decoding(kind, planner):
    assert run(engine(kind, planner), PROMPTS, max_tokens=COUNT, temperature=0) == wanted()


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 1},
        {"max_running": 2, "max_step_tokens": 3},
        {"max_step_tokens": 7},
        {"pages": 13},
        {"pages": 13, "prefix_caching": False, "max_step_tokens": 11},
        {"page_size": 1, "pages": 60},
        {"page_size": 64, "pages": 4},
        {"max_draft": 1},
    ],
    ids=str,
)
def test_no_limit_changes_the_text(kind, options):
    core = engine(kind, **options)
    assert run(core, PROMPTS, max_tokens=COUNT, temperature=0) == wanted()
    assert run(core, PROMPTS, max_tokens=COUNT, temperature=0) == wanted()  # now from the prefix cache


@functools.cache
def seeded():
    return tuple(
        SamplingParams(max_tokens=COUNT, temperature=0.8 + 0.1 * i, top_k=20 * (i % 2), seed=i) for i in range(5)
    )


@functools.cache
def sampled():
    return [run(engine(), [prompt], [params])[0] for prompt, params in zip(PROMPTS, seeded(), strict=True)]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_seed_gives_the_same_text_under_every_drafter_and_plan(kind, planner):
    assert run(engine(kind, planner), PROMPTS, seeded()) == sampled()


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_seed_gives_the_same_text_under_every_load(kind):
    core = engine(kind, pages=15, max_step_tokens=10)
    found = run(core, [*PROMPTS[::-1], *PROMPTS], [*seeded()[::-1], *seeded()])
    assert found == [*sampled()[::-1], *sampled()]
