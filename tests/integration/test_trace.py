"""Traces tell where every committed token came from, agree with the statistics, and change nothing."""

from dataclasses import replace

import pytest

from dspark.common.sampling_params import SamplingParams
from dspark.engine.llm import LLM

PROMPTS = ["def add(a, b):", "class Stack:\n"]
SAMPLED = SamplingParams(max_tokens=60, temperature=0.7, seed=3, ignore_eos=True)


@pytest.fixture(scope="module", params=["full", "fixed:2", "threshold:0.4"])
def llm(request, tiny_pair):
    return LLM(tiny_pair.target, tiny_pair.drafter, request.param, device="cpu", pages=200)


def test_a_block_that_stands_ends_in_a_bonus(tiny_pair):
    llm = LLM(tiny_pair.target, tiny_pair.target, "fixed:3", device="cpu", pages=200)  # a target that drafts for itself
    trace = llm.generate(PROMPTS[0], replace(SAMPLED, max_tokens=13, trace=True))[0].trace
    assert [one.kind for one in trace] == ["plain", *["accepted", "accepted", "accepted", "bonus"] * 3]
    assert [one.slot for one in trace[1:5]] == [1, 2, 3, None]


@pytest.mark.parametrize("params", [SAMPLED, replace(SAMPLED, temperature=0.0), replace(SAMPLED, speculation="off")])
def test_a_trace_tells_what_the_statistics_count(llm, params):
    for plain, traced in zip(
        llm.generate(PROMPTS, params), llm.generate(PROMPTS, replace(params, trace=True)), strict=True
    ):
        assert plain.trace is None and (plain.text, plain.token_ids) == (traced.text, traced.token_ids)
        assert [one.token_id for one in traced.trace] == traced.token_ids
        assert "".join(one.text for one in traced.trace) == traced.text
        kinds = [one.kind for one in traced.trace]
        counts, rounds = traced.statistics, traced.statistics.rounds
        assert kinds[0] == "plain"  # the prompt's own step drafts nothing
        assert kinds.count("accepted") in range(counts.accepted - 5, counts.accepted + 1)  # the end may cut a block
        assert kinds.count("corrected") + kinds.count("bonus") + kinds.count("plain") in (rounds, rounds + 1)
        if params.speculation == "off":
            assert set(kinds) == {"plain"}
        elif params.temperature:
            assert {"accepted", "corrected"} <= set(kinds)


def test_slots_count_up_and_a_correction_differs_from_its_draft(llm):
    trace = llm.generate(PROMPTS[0], replace(SAMPLED, trace=True))[0].trace
    slot = 0
    for one in trace:
        if one.kind == "accepted":
            slot += 1
            assert one.slot == slot and 0 <= one.confidence <= 1 and one.rejected is None
            continue
        if one.kind == "corrected":
            assert one.slot == slot + 1 and one.rejected not in (None, one.token_id) and 0 <= one.confidence <= 1
        else:
            assert one.slot is one.confidence is one.rejected is None
        slot = 0


def test_the_first_position_of_the_statistics_is_the_first_slot(llm):
    result = llm.generate(PROMPTS[1], replace(SAMPLED, trace=True))[0]
    counts = [0] * 6
    for one in result.trace:
        counts[(one.slot or 0) - 1] += one.kind == "accepted"
    assert counts[0] == result.statistics.accepted_at[0]


def test_texts_join_where_a_stop_string_holds_some_back(llm):
    free = llm.generate(PROMPTS[0], SAMPLED)[0].text
    stop = free[len(free) // 2 :][:3]
    for stops in ([stop], [free[-2:] + "no such end"]):
        plain = llm.generate(PROMPTS[0], replace(SAMPLED, stop=stops))[0]
        traced = llm.generate(PROMPTS[0], replace(SAMPLED, stop=stops, trace=True))[0]
        assert (traced.text, traced.token_ids) == (plain.text, plain.token_ids)
        assert "".join(one.text for one in traced.trace) == traced.text and len(traced.trace) == len(traced.token_ids)


def test_only_those_who_ask_are_traced(llm):
    asked, other = llm.generate(PROMPTS, [replace(SAMPLED, trace=True), SAMPLED])
    assert len(asked.trace) == 60 and other.trace is None


def test_the_end_of_text_is_a_token_without_text(llm):
    first = llm.generate(PROMPTS[0], SAMPLED)[0].token_ids
    params = replace(SAMPLED, stop_token_ids=[first[20]], trace=True)
    result = llm.generate(PROMPTS[0], params)[0]
    assert result.finish_reason == "stop" and result.trace[-1].token_id == first[20] and result.trace[-1].text == ""
    assert "".join(one.text for one in result.trace) == result.text
