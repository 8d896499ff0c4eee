"""When a request ends, and that nothing past its end is shown, inside an accepted block too."""

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from engines import CONTEXT, DRAFTERS, drafter, drain, engine, plain, plain_model, prompts, target

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.config import EngineConfig
from dspark.engine.step import EngineCore

PROMPT = prompts((7,))[0]
TOKENIZER = byte_tokenizer()


def speaking(kind="draft_model", **changes):
    """An engine with a tokenizer; `draft_model` gets most of its drafts accepted."""
    config = EngineConfig(page_size=4, pages=80, seed=0)
    return EngineCore(target(), drafter(kind), tokenizer=TOKENIZER, config=config, **changes)


def finish(core, prompt=PROMPT, **fields):
    request_id = core.add(prompt, SamplingParams(**({"temperature": 0, "max_tokens": 20} | fields)))
    commits = drain(core)[request_id]
    assert all(commit.finish_reason is None for commit in commits[:-1])
    tokens = [token for commit in commits for token in commit.token_ids]
    return tokens, "".join(commit.text for commit in commits), commits[-1].finish_reason


@pytest.mark.parametrize("kind", ["none", "draft_model", "ngram"])
def test_stop_tokens_end_the_tokens_and_are_not_text(kind):
    wanted = plain(PROMPT, 20)
    for position in (0, 5, 6, 7, 8):
        end = wanted.index(wanted[position])
        text = TOKENIZER.decode(wanted[:end]).rstrip("�")
        for fields, options in (({"stop_token_ids": [wanted[end]]}, {}), ({}, {"eos_token_ids": [wanted[end]]})):
            tokens, found, reason = finish(speaking(kind, **options), **fields)
            assert (tokens, found, reason) == (wanted[: end + 1], text, "stop")


def test_eos_can_be_ignored():
    core = speaking(eos_token_ids=[plain(PROMPT, 6)[5]])
    assert finish(core, ignore_eos=True)[0] == plain(PROMPT, 20)


@pytest.mark.parametrize("kind", ["none", "draft_model"])
def test_stop_strings_inside_a_block(kind):
    wanted = plain(PROMPT, 20)
    whole = TOKENIZER.decode(wanted)
    for start in range(1, 12):
        stop = whole[start : start + 2]
        if "�" in stop or len(stop) < 2:
            continue
        tokens, text, reason = finish(speaking(kind), stop=["never this", stop])
        assert text == whole[: whole.index(stop)] and reason == "stop"
        assert stop in TOKENIZER.decode(tokens) and stop not in TOKENIZER.decode(tokens[:-1])
        assert tokens == wanted[: len(tokens)]


def test_max_tokens_and_the_context_end_with_length():
    for count in (1, 2, 5):
        assert finish(speaking(), max_tokens=count)[::2] == (plain(PROMPT, count), "length")
    tokens, _, reason = finish(speaking(), max_tokens=None)
    assert len(PROMPT) + len(tokens) == CONTEXT and reason == "length"
    long = prompts((CONTEXT - 1,))[0]
    assert finish(speaking(), long) == (plain(long, 1), finish(speaking(), long)[1], "length")


def test_without_max_tokens_the_pool_is_the_limit():
    core = engine("draft_model", pages=6)  # 20 slots: 21 tokens, for the last one is in no page
    request_id = core.add(PROMPT, SamplingParams(max_tokens=None, temperature=0))
    commits = drain(core)[request_id]
    assert len(PROMPT) + sum(len(commit.token_ids) for commit in commits) == 21


@pytest.mark.parametrize("kind", DRAFTERS)
def test_log_probabilities_are_the_targets_own(kind):
    core = speaking(kind)
    params = [
        SamplingParams(max_tokens=9, temperature=0.7, top_k=5, seed=i, logprobs=n)
        for i, n in ((0, 3), (1, 0), (2, None))
    ]
    ids = [core.add(PROMPT, p) for p in params]
    commits = drain(core)
    for request_id, count in zip(ids, (3, 0, None), strict=True):
        tokens = [t for commit in commits[request_id] for t in commit.token_ids]
        if count is None:
            assert all(commit.logprobs is None for commit in commits[request_id])
            continue
        with torch.no_grad():
            wanted = plain_model()(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
        found = [entry for commit in commits[request_id] for entry in commit.logprobs]
        assert [entry.token_id for entry in found] == tokens
        for row, entry in zip(wanted, found, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]))
            values, ids_ = row.topk(count)
            assert [t for t, _ in entry.top] == ids_.tolist()
            assert [v for _, v in entry.top] == pytest.approx(values.tolist())


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * CONTEXT, {}, f"{CONTEXT} tokens, the model's context {CONTEXT}; pass {CONTEXT - 1}"),
        ([61], {}, "prompt token 61 .* 61 tokens"),
        ([-1], {}, "prompt token -1"),
        ([1] * 10, {"max_tokens": 40}, "10 prompt tokens and 40 more need 13 pages, the pool has 9"),
        ([1] * 60, {"max_tokens": None}, "60 prompt tokens and 1 more need 15 pages, the pool has 9"),
        ([1], {"logit_bias": {61: 1.0}}, "logit_bias token 61"),
        ([1], {"stop_token_ids": [99]}, "stop_token_ids token 99"),
        ([1], {"stop": ["a"]}, "stop 'a' needs a tokenizer"),
        ([1], {"logprobs": 21}, "logprobs 21 is above 20"),
        ([1], {"stop": ["x"] * 65}, "65 stop strings"),
        ("text", {}, "needs a tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(prompt, fields, words):
    core = engine("none", pages=10)
    with pytest.raises(UserError, match=words) as caught:
        core.add(prompt, SamplingParams(**fields))
    assert "\n" not in str(caught.value)
    assert core.idle
    core.check_integrity()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"page_sise": 4}, "page_sise.*did you mean page_size"),
        ({"max_running": 0}, "max_running 0"),
        ({"pages": 1}, "pages 1"),
        ({"max_draft": -1}, "max_draft -1"),
    ],
)
def test_engine_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        EngineConfig.of(**options)
