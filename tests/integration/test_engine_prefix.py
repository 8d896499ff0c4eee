"""A prefix-cache hit saves the target's work and changes neither the text nor what is accepted."""

import pytest
from engines import drain, engine, prompts

from dspark.common.sampling_params import SamplingParams

PROMPT = prompts((33,))[0]


def statistics_of(core, prompt, **fields):
    request_id = core.add(prompt, SamplingParams(max_tokens=24, **fields))
    commits = drain(core)[request_id]
    return [t for commit in commits for t in commit.token_ids], commits[-1].statistics


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 3}], ids=str)
@pytest.mark.parametrize("kind", ["dspark", "dflash", "draft_model", "ngram"])
@pytest.mark.parametrize("length", [33, 30])
def test_a_hit_does_not_change_acceptance(kind, fields, length):
    core = engine(kind, max_step_tokens=16)
    prompt = PROMPT[:length]
    cold_tokens, cold = statistics_of(core, prompt, **fields)
    warm_tokens, warm = statistics_of(core, prompt, **fields)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, (length - 1) // 4 * 4)
    assert warm_tokens == cold_tokens
    assert warm.tokens_per_round == cold.tokens_per_round
    assert (warm.rounds, warm.accepted_at) == (cold.rounds, cold.accepted_at)
    if kind == "draft_model":
        assert cold.tokens_per_round > 1.5, "nothing accepted: the test says nothing"


def test_the_drafter_reads_what_the_first_request_left():
    """With its context pools wiped, a hit would lower acceptance: the test above can fail."""
    core = engine("draft_model")
    cold_tokens, cold = statistics_of(core, PROMPT, temperature=0)
    for pool in (*core.drafter.pool.keys, *core.drafter.pool.values):
        pool.zero_()
    warm_tokens, warm = statistics_of(core, PROMPT, temperature=0)
    assert warm_tokens == cold_tokens
    assert warm.tokens_per_round < cold.tokens_per_round


def test_a_conversation_finds_what_was_generated():
    core = engine("draft_model")
    answer, _ = statistics_of(core, PROMPT[:9], temperature=0)
    _, second = statistics_of(core, [*PROMPT[:9], *answer, 5, 6], temperature=0)
    assert second.cached_tokens == (9 + 24 - 1) // 4 * 4


def test_requests_running_side_by_side_share_pages():
    core = engine("none")
    core.add(PROMPT, SamplingParams(max_tokens=8, temperature=0))
    core.step()
    before = core.admission.pool.available
    core.add(PROMPT, SamplingParams(max_tokens=8, temperature=0))
    core.step()
    assert before - core.admission.pool.available <= 2
    drain(core)
