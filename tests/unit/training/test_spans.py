"""What is supervised decodes to what the assistant said, and what comes before it is the prompt it answered."""

import pytest
from templates import BARE, BRACKETS, END, MISLEADING, PLAIN, THINKING, byte_tokenizer

from dspark.common.chat import chat_text
from dspark.common.errors import UserError
from dspark.training.samples import Sample
from dspark.training.spans import Speller

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "plans?"},
    {"role": "assistant", "content": " yes, naïve ones 🙂 "},
    {"role": "user", "content": "answer: answer"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "never answered"},
]


def spelled(template, messages, options=None, **fields):
    """(text of the page, supervised texts one by one) of every page, and the speller."""
    tokenizer = byte_tokenizer(template)
    ends = [tokenizer.convert_tokens_to_ids(END)]
    speller = Speller(tokenizer, ends=ends, options=options)
    found = []
    for ids, mask in speller.documents(speller.pages(Sample("x", messages=messages, **fields))):
        assert len(ids) == len(mask)
        pieces, run = [], []
        for token, supervised in zip([*ids, 0], [*mask, 0], strict=True):
            if supervised:
                run.append(token)
            elif run:
                pieces.append(tokenizer.decode(run))
                run = []
        found.append((tokenizer.decode(ids), pieces))
    return found


def test_every_turn_of_a_conversation():
    [(text, answers)] = spelled(PLAIN, TALK)
    assert answers == [" yes, naïve ones 🙂 <|end|>", "answer<|end|>"]
    assert text == chat_text(byte_tokenizer(PLAIN), TALK[:5], add_generation_prompt=False).rstrip("\n")


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place():
    [(text, answers)] = spelled(
        PLAIN, [{"role": "user", "content": "answer"}, {"role": "assistant", "content": "answer"}]
    )
    assert answers == ["answer<|end|>"] and text.endswith("assistant\nanswer<|end|>")


def test_an_answer_cut_by_length_is_not_ended():
    [(_, answers)] = spelled(PLAIN, TALK[:5], endings=["stop", "length"])
    assert answers == [" yes, naïve ones 🙂 <|end|>", "answer"]


def test_tools():
    call = {"function": {"name": "clock", "arguments": {}}}
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "noon"},
    ]
    [(text, answers)] = spelled(PLAIN, messages)
    assert len(answers) == 2 and "clock" in answers[0] and answers[1] == "noon<|end|>"
    assert "tool\nnoon" in text


def test_thoughts_are_learnt_where_they_are_shown():
    """Earlier turns lose their thoughts, so each turn is supervised in the page that shows it as it was written."""
    messages = [dict(message) for message in TALK[1:5]]
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "hm", "so"
    pages = spelled(THINKING, messages)
    assert [answers for _, answers in pages] == [
        ["<think>\nhm\n</think>\n\n yes, naïve ones 🙂 <|end|>"],
        ["<think>\nso\n</think>\n\nanswer<|end|>"],
    ]
    assert "hm" not in pages[1][0] and "yes" in pages[1][0]


def test_thinking_switched_off_is_part_of_the_prompt():
    pages = spelled(THINKING, TALK[1:5], {"enable_thinking": False})
    assert [answers for _, answers in pages] == [[" yes, naïve ones 🙂 <|end|>"], ["answer<|end|>"]]
    assert pages[1][0].count("<think>\n\n</think>\n\n") == 1


def test_answers_that_end_with_the_end_of_text():
    [(_, answers)] = spelled(BRACKETS, TALK[1:5])
    assert answers == ["  yes, naïve ones 🙂 <|text_end|>", " answer<|text_end|>"]


def test_turns_that_nothing_ends():
    [(_, answers)] = spelled(BARE, TALK[1:5])
    assert [answer.strip() for answer in answers] == ["yes, naïve ones 🙂", "answer"]


def test_a_token_split_by_the_edge_is_the_prompts():
    """`BRACKETS` without its brackets: the prompt's last character and the answer's first are one token."""
    template = BRACKETS.replace("'['", "''").replace("']'", "''").replace("' ' + ", "")
    [(text, answers)] = spelled(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "nswer"}])
    assert text.endswith("answer<|text_end|>") and answers == ["wer<|text_end|>"]


def test_a_template_that_misleads_is_shown():
    with pytest.raises(UserError, match=r"cannot be spanned: it shows turn 2 after '.*nswer.*asks for it after.*think"):
        spelled(MISLEADING, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}])


def test_no_template_and_a_template_that_refuses():
    with pytest.raises(UserError, match="no chat template"):
        spelled(None, TALK)
    with pytest.raises(UserError, match="refuses the messages: no system"):
        spelled("{{ raise_exception('no system') }}", TALK)


def test_offsets_that_cannot_be_trusted():
    tokenizer = byte_tokenizer(PLAIN)
    speller = Speller(tokenizer)
    [page] = speller.pages(Sample("x", messages=TALK[:3]))
    coded = tokenizer(page.text, add_special_tokens=False, return_offsets_mapping=True)
    moved = [(a + 1, b + 1) for a, b in coded["offset_mapping"]]
    import numpy as np

    with pytest.raises(UserError, match="cannot be trusted"):
        speller.document(page, coded["input_ids"], np.array(moved))


def test_raw_text():
    tokenizer = byte_tokenizer(None)
    speller = Speller(tokenizer)
    text = Sample("a", text="plans é")
    asked = Sample("b", text="pla", completion="ns", endings=["length"])
    ended = Sample("c", text="plan", completion="", endings=["stop"])
    whole, part, stop = speller.documents([page for s in (text, asked, ended) for page in speller.pages(s)])
    assert tokenizer.decode(whole[0]) == "plans é" and all(whole[1])
    assert tokenizer.decode(part[0]) == "plans" and sum(part[1]) == 0  # "ans" is one token, begun by the prompt
    assert tokenizer.decode(stop[0]) == "plan<|text_end|>" and stop[1] == [0, 0, 0, 1]


def test_a_tokenizer_without_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="no offsets"):
        Speller(Slow())
