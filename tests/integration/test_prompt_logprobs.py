"""Log-probabilities of a prompt's tokens are those of the target's plain forward, however the prompt was computed."""

import random

import pytest
import torch
from engines import VOCABULARY, engine, plain_model

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(VOCABULARY) for _ in range(length)] for length in (1, 2, 40, 90, 17)]
READ = SamplingParams(max_tokens=0, prompt_logprobs=3)


def forward(tokens):
    """The library's own log-probabilities after each token, float64 [T, V]."""
    with torch.no_grad():
        return torch.log_softmax(plain_model()(torch.tensor([tokens])).logits[0], dim=-1)


def check(found, tokens, top):
    log_TV = forward(tokens)
    assert [one.token_id for one in found] == tokens[1:]
    for one, log_V in zip(found, log_TV, strict=False):
        assert one.logprob == pytest.approx(float(log_V[one.token_id]), abs=1e-4)
        values = log_V.topk(top).values.tolist()
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
        assert all(float(log_V[token]) == pytest.approx(value, abs=1e-4) for token, value in one.top)


def run(core, asked):
    """Commits by request until all are done."""
    commits = {core.add(prompt, params): [] for prompt, params in asked}
    while not core.idle:
        for commit in core.step():
            commits[commit.request_id].append(commit)
        core.check_integrity()
    return list(commits.values())


@pytest.mark.parametrize("kind", ["none", "dspark", "draft_model"])
def test_scores_are_the_forwards(kind):
    """In chunks of a prefill, beside others that decode and draft, with a warm prefix cache."""
    core = engine(kind, max_step_tokens=24)
    run(core, [(prompt, SamplingParams(max_tokens=3)) for prompt in PROMPTS])  # every page is known
    writing = SamplingParams(max_tokens=12, temperature=0, prompt_logprobs=1, logprobs=2)
    plain = SamplingParams(max_tokens=12, temperature=0)
    asked = [pair for prompt in PROMPTS for pair in ((prompt, READ), (prompt, writing), (prompt, plain))]
    told = run(core, asked)
    assert all(commit.prompt_logprobs is None for commits in told for commit in commits[1:])
    for prompt, read, wrote, without in zip(PROMPTS, told[::3], told[1::3], told[2::3], strict=True):
        (only,) = read
        assert only.token_ids == [] and only.finish_reason == "length"
        check(only.prompt_logprobs, prompt, 3)
        check(wrote[0].prompt_logprobs, prompt, 1)
        assert without[0].prompt_logprobs is None
        tokens = [token for commit in wrote for token in commit.token_ids]
        assert tokens == [token for commit in without for token in commit.token_ids]
        after = [one for commit in wrote for one in commit.logprobs]
        log_TV = forward(prompt + tokens)[len(prompt) - 1 :]
        assert [one.logprob for one in after] == pytest.approx(
            [float(log_V[token]) for log_V, token in zip(log_TV, tokens, strict=False)], abs=1e-4
        )


def test_a_preempted_prompt_is_scored_once():
    """Pages run out in the middle of prompts: what was scored stays, what was not comes after."""
    core = engine(pages=48, max_step_tokens=16)
    asked = [(prompt, SamplingParams(max_tokens=30, temperature=0, prompt_logprobs=2)) for prompt in PROMPTS]
    told = run(core, asked)
    assert any(commits[-1].statistics.preemptions for commits in told)
    for prompt, commits in zip(PROMPTS, told, strict=True):
        check(commits[0].prompt_logprobs, prompt, 2)
        assert sum(commit.prompt_logprobs is not None for commit in commits) == 1


def test_a_prompt_without_a_second_token_has_no_scores():
    ((only,),) = run(engine(), [(PROMPTS[0], READ)])
    assert only.prompt_logprobs == []


@pytest.mark.parametrize("trace", [False, True])
def test_reading_with_everything_else_asked_for(trace):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, logprobs=1, trace=trace, stop_token_ids=(3,))
    ((only,),) = run(engine("dspark"), [(PROMPTS[2], params)])
    assert only.logprobs == [] and only.trace == ([] if trace else None) and only.text == ""
    assert all(one.top == [] for one in only.prompt_logprobs)


def test_bounds():
    with pytest.raises(UserError, match="prompt_logprobs 21 is above 20"):
        engine().add([1, 2], SamplingParams(prompt_logprobs=21))
    with pytest.raises(UserError, match="max_tokens 0 is out of range; pass 1 or more"):
        SamplingParams(max_tokens=0)
