"""The model's own answer goes into its next turn, by the template or as plain text."""

import pytest

from dspark.common.sampling_params import SamplingParams
from dspark.engine.build import build_engine
from dspark.evaluation.conversations import Transcript, converse

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
TALKS = [["def add(", "again"], ["class"], ["import", "os", "sys"]]


@pytest.fixture(scope="module")
def core(tiny_pair):
    return build_engine(tiny_pair.target, tiny_pair.drafter, max_running=2, compile=False, seed=0)


def heard(core, monkeypatch):
    """Prompts as text, as the engine gets them."""
    prompts, add = [], core.add
    monkeypatch.setattr(core, "add", lambda prompt, params: prompts.append(prompt) or add(prompt, params))
    return prompts


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_answers_are_in_the_next_prompt(core, monkeypatch, template):
    monkeypatch.setattr(core.tokenizer, "chat_template", template)
    prompts = heard(core, monkeypatch)
    measured, left_out = converse(core, TALKS, SamplingParams(temperature=0, max_tokens=6))
    assert left_out == 0 and len(prompts) == len(measured.texts) == 6
    texts = [core.tokenizer.decode(prompt) for prompt in prompts]
    answers = [core.tokenizer.decode(text, skip_special_tokens=True) for text in measured.texts]
    if template:
        assert texts[1] == "<user>class<assistant>"
        last = f"<user>import<assistant>{answers[2]}<user>os<assistant>{answers[4]}<user>sys<assistant>"
    else:
        assert texts[1] == "class"
        last = f"import{answers[2]}\n\nos{answers[4]}\n\nsys"
    assert prompts[5] == list(core.tokenizer(last, add_special_tokens=template is None)["input_ids"])
    assert sum(record.accepted for record in measured.records) == measured.statistics.accepted


def test_turns_that_do_not_fit_are_left_out_and_counted(core):
    long = "x = 1\n" * 400
    measured, left_out = converse(core, [["def", long, "more"], [long], ["a"]], SamplingParams(max_tokens=3))
    assert left_out == 3 and len(measured.texts) == 2


def test_prompts_ask_for_no_thinking(core, monkeypatch):
    monkeypatch.setattr(core.tokenizer, "chat_template", "{{ messages[0].content }}{{ enable_thinking }}")
    said = Transcript(["a"])
    assert core.tokenizer.decode(said.prompt(core.tokenizer)) == "aFalse"
    assert core.tokenizer.decode(said.prompt(core.tokenizer, thinking=True)) == "aTrue"
