"""Latencies of a served load, by the definitions of `vllm bench serve`, from events at known times."""

import json

import pytest

from dspark.common.errors import UserError
from dspark.evaluation.client import Answer
from dspark.evaluation.serving import Offered, counted, questions_of, synthetic
from dspark.evaluation.serving_report import details, draw_serving, most_at_once, parse_goodput, summary


def event(**fields):
    return b"data: " + json.dumps(fields).encode()


def text(piece, **more):
    return event(choices=[{"text": piece, "finish_reason": None} | more])


def answer(start, stamps, tokens):
    """A text of `tokens` tokens whose events came at `stamps`."""
    told = Answer(start)
    usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": tokens})
    told.read([*((stamp, text("x")) for stamp in stamps), (99.0, usage), (99.0, b"data: [DONE]")])
    return told


def test_an_event_of_several_tokens_is_one_itl_and_as_many_tokens():
    told = answer(10.0, [10.5, 10.6, 11.0], tokens=9)
    assert (told.ttft, told.latency) == (0.5, 1.0) and told.text == "xxx" and told.error is None
    assert told.itl == pytest.approx([0.1, 0.4]) and told.tpot == pytest.approx(0.5 / 8)
    assert answer(0.0, [1.0], tokens=1).tpot == 0.0


def test_chat_comments_and_servers_that_do_not_count():
    told = Answer(0.0)
    chat = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    more = b"event: message\n" + event(choices=[{"delta": {"content": "hi"}, "finish_reason": "stop"}])
    told.read([(1.0, b": ping"), (1.5, chat), (2.0, more)])
    assert (told.ttft, told.latency, told.text, told.output_tokens, told.error) == (1.5, 2.0, "hi", 2, None)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([], "held no text"),
        ([(1.0, text("a"))], "ended before the text did"),
        ([(1.0, text("a")), (2.0, event(error={"message": "out of memory"}))], "out of memory"),
        ([(1.0, b"data: [DONE]")], "held no text"),
    ],
)
def test_what_is_no_answer(events, says):
    told = Answer(0.0)
    told.read(events)
    assert says in told.error


def test_the_numbers_of_a_load():
    failed = Answer(3.0, error="500: no")
    offered = Offered([answer(0.0, [0.1, 0.5], 5), answer(1.0, [1.4, 2.0], 3), failed], 4.0, None)
    found = summary(offered, goodput={"ttft": 200.0, "tpot": 100.0}, percentiles=[99])
    assert (found["completed"], found["failed"], found["max_concurrent_requests"]) == (2, 1, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10, 8)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 2.0, 4.5)
    assert found["request_goodput"] == 0.25  # the second's first token is late
    assert found["mean_ttft_ms"] == pytest.approx(250) and found["median_tpot_ms"] == pytest.approx(200)
    assert found["p99_itl_ms"] == pytest.approx(400 + 0.99 * 200) and found["mean_e2el_ms"] == pytest.approx(750)
    listed = details(offered)
    assert listed["output_lens"] == [5, 3, 0] and listed["errors"] == ["", "", "500: no"] and listed["itls"][2] == []


def test_the_most_at_once_counts_one_that_leaves_before_one_that_comes():
    assert most_at_once([answer(0.0, [1.0], 1), answer(0.5, [2.0], 1), answer(1.0, [3.0], 1)]) == 2
    assert most_at_once([]) == 0


def test_goodput_is_parsed_or_refused():
    assert parse_goodput(["ttft:200,tpot:20", "e2el:3e3"]) == {"ttft": 200, "tpot": 20, "e2el": 3000}
    for wrong in ("ttft", "itl:3", "ttft:-1", "tpot:inf", "ttft:nan"):
        with pytest.raises(UserError, match="no limit"):
            parse_goodput([wrong])


def test_speculation_is_what_was_counted_between_two_readings():
    before = {"num_drafts": [10.0], "num_draft_tokens": [70.0], "num_accepted_tokens": [20.0]}
    after = {"num_drafts": [20.0], "num_draft_tokens": [110.0], "num_accepted_tokens": [40.0]}
    after["num_accepted_tokens_per_pos"] = [8.0, 2.0]
    found = counted(before, after)
    assert found["spec_decode_acceptance_length"] == 3.0 and found["spec_decode_acceptance_rate"] == 50.0
    assert found["spec_decode_per_position_acceptance_rates"] == [0.8, 0.2]
    assert counted(before, before) is None and counted(None, after) is None


def test_prompts_and_lengths_are_the_same_for_a_seed():
    prompts = synthetic([(3, 3), (1, 9)], seed=1)
    assert prompts == synthetic([(3, 3), (1, 9)], seed=1) != synthetic([(3, 3), (1, 9)], seed=2)
    assert len(prompts[0].split()) == 3 and 1 <= len(prompts[1].split()) <= 9
    asked = questions_of(prompts, [0.0, 0.5, 1.0], [(4, 8)] * 3, seed=0)
    assert [q.prompt for q in asked] == [*prompts, prompts[0]] and asked[2].due == 1.0
    assert all(4 <= q.max_tokens <= 8 for q in asked)


def test_figures_need_an_answer(tmp_path):
    draw_serving(tmp_path, Offered([answer(0.0, [0.1, 0.5], 5)], 1.0, None))
    assert {path.name for path in tmp_path.iterdir()} == {"latency.png", "course.png"}
    with pytest.raises(UserError, match="nothing to draw"):
        draw_serving(tmp_path, Offered([Answer(error="no")], 1.0, None))
