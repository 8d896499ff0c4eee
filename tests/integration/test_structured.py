"""Structured output through the library: JSON that validates, drafts that obey, grammars that cannot be."""

import json
import re

import pytest

from dspark.common.errors import UserError
from dspark.common.grammar import MOST_BYTES, Grammar
from dspark.common.sampling_params import SamplingParams
from dspark.engine.llm import LLM

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tiny_pair):
    return LLM(tiny_pair.target, tiny_pair.drafter, device="cpu", pages=200, seed=0)


def fits(text):
    found = json.loads(text)
    assert set(found) == set(SCHEMA["required"]) and len(found["name"]) <= 6
    assert 0 <= found["age"] <= 99 and found["kind"] in ("cat", "dog")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 1, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "presence_penalty": 0.3, "logprobs": 1},
    ],
    ids=str,
)
def test_json_fits_its_schema_and_speculates(llm, fields):
    params = SamplingParams(max_tokens=300, grammar=Grammar.json_schema(SCHEMA), **fields)
    results = llm.generate(["def add(a, b):", "class"] * 2, params)
    for result in results:
        assert result.finish_reason == "stop" and result.error is None
        fits(result.text)
    rounds = sum(result.statistics.rounds for result in results)
    # The tiny drafter is random: what it gets right is what the grammar leaves no choice about.
    assert sum(result.statistics.accepted for result in results) > 0.3 * rounds
    llm.core.check_integrity()


def test_every_kind_of_grammar(llm):
    cases = {
        Grammar.choice(["yes", 'no "never"', "vielleicht – später"]): r'yes|no "never"|vielleicht – später',
        Grammar.regex(r"[0-9]{3}-[a-f]+z"): r"[0-9]{3}-[a-f]+z",
        Grammar.grammar('start: "a" start | "b"'): r"a*b",
        Grammar.grammar('root ::= "yes" | "no" [0-9]'): r"yes|no[0-9]",
    }
    for grammar, pattern in cases.items():
        result = llm.generate("x", SamplingParams(max_tokens=200, grammar=grammar, seed=1))[0]
        assert result.finish_reason == "length" or re.fullmatch(pattern, result.text), (grammar, result.text)
    found = llm.generate("x", SamplingParams(max_tokens=60, grammar=Grammar.json_object(), temperature=0))[0]
    assert found.text.startswith("{")


def test_an_open_end_is_the_models_choice(llm):
    """The end is allowed only where the text is one of the grammar's."""
    ends = [SamplingParams(max_tokens=12, grammar=Grammar.regex("(ab)*c?"), seed=seed) for seed in range(12)]
    for result in llm.generate(["x"] * 12, ends):
        assert re.fullmatch("(ab)*c?" if result.finish_reason == "stop" else "(ab)*a?", result.text), result


BAD = [
    (Grammar.json_schema({"type": "objekt"}), "Invalid type: objekt"),
    (Grammar.json_schema("{"), "not valid"),
    (Grammar.json_schema({"type": "string", "not": {}}), "not"),
    (Grammar.json_schema({"$ref": "http://elsewhere/schema"}), "does not fetch"),
    (Grammar.regex("(a"), "unclosed group"),
    (Grammar.regex("(a{1000}){1000}"), "too complex"),
    (Grammar.grammar("start: nowhere"), "unknown name"),
    (Grammar.grammar("???"), "not valid"),
]


@pytest.mark.parametrize(("grammar", "words"), BAD, ids=[words for _, words in BAD])
def test_grammars_that_cannot_be_are_one_line(llm, grammar, words):
    with pytest.raises(UserError, match=words) as caught:
        llm.generate("x", SamplingParams(grammar=grammar))
    assert "\n" not in str(caught.value)


def test_what_is_no_grammar_is_refused():
    for made, words in (
        (lambda: Grammar.regex("a" * (MOST_BYTES + 1)), "at most"),
        (lambda: Grammar.choice([]), "at least one"),
        (lambda: Grammar.choice(["a", ""]), "none of them empty"),
        (lambda: Grammar.json_schema({"a": {1, 2}}), "not JSON"),
        (lambda: Grammar("sql", "x"), "json_schema"),
        (lambda: Grammar.regex("\ud800"), "Unicode"),
        (lambda: SamplingParams(grammar="[a-z]+"), "Grammar.json_object"),
        (lambda: SamplingParams(grammar=Grammar.regex("a"), ignore_eos=True), "ignore_eos"),
    ):
        with pytest.raises(UserError, match=words):
            made()


def test_the_library_can_be_missing(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"dspark\[structured\]"):
        llm.generate("x", SamplingParams(grammar=Grammar.regex("never compiled before")))


def test_a_grammar_that_fails_midway_fails_its_request_alone(llm, monkeypatch):
    """Past its limits the library stops; the request says so and the others go on."""
    params = [
        SamplingParams(max_tokens=40, grammar=Grammar.regex("[a-z]{30}"), temperature=0),
        SamplingParams(max_tokens=40),
    ]
    made = llm.core.intake.grammars.matcher

    def failing(grammar):
        matcher = made(grammar)
        advance = matcher.advance

        def broken(token):
            advance(token)
            if len(taken) > 6:
                matcher._wrong = "lexer error: too many states"
            taken.append(token)

        taken = []
        matcher.advance = broken
        return matcher

    monkeypatch.setattr(llm.core.intake.grammars, "matcher", failing)
    failed, other = llm.generate(["x", "y"], params)
    assert (failed.finish_reason, failed.error) == ("error", "lexer error: too many states")
    assert other.finish_reason == "length" and other.error is None
    llm.core.check_integrity()
