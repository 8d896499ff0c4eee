"""Calls found in texts that arrive in any pieces; what only looks like a call stays content."""

import json
from dataclasses import replace

import pytest

from dspark.server.tool_calls import HERMES, LLAMA, MISTRAL, CallReader

ONE, TWO = '{"name": "add", "arguments": {"a": 1}}', '{"name": "say", "arguments": {"text": "ü ]"}}'
SWAPPED = '{"arguments": {"a": 1}, "name": "add"}'
CASES = [
    (HERMES, f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "Let me see.\n", 2),
    (HERMES, f"<tool_call>{ONE}</tool_call>", "", 1),
    (HERMES, f"<tool_call>\n{ONE}", "", 1),  # cut off behind a whole call
    (HERMES, "a < b and <tool_ is no mark", "a < b and <tool_ is no mark", 0),
    (HERMES, "<tool_call>{not json}</tool_call> so", "<tool_call>{not json}</tool_call> so", 0),
    (
        HERMES,
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        0,
    ),
    (MISTRAL, f"Well. [TOOL_CALLS] [{ONE}, {TWO}]", "Well. ", 2),
    (MISTRAL, "[TOOL_CALLS", "[TOOL_CALLS", 0),
    (LLAMA, ONE.replace("arguments", "parameters"), "", 1),
    (LLAMA, "<|python_tag|>" + ONE, "", 1),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', 0),
    (LLAMA, "The set {1, 2}.", "The set {1, 2}.", 0),
    (HERMES, f"<tool_call>\n{SWAPPED}\n</tool_call>", "", 1),
    (HERMES, f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", 2),
    (HERMES, f'<tool_call>{ONE[:-1]}, "more": [{{}}, "}}"]}}</tool_call>', "", 1),
    (HERMES, f"<tool_call>{ONE}</tool_call>\n That is all.", "\n That is all.", 1),
    (HERMES, f"<tool_call>{ONE} That is all.", " That is all.", 1),
    (HERMES, '<tool_call>{"name": "add", "arg', '<tool_call>{"name": "add", "arg', 0),
    (HERMES, '<tool_call>{"name": "add", "arguments": 3}</tool_call>', None, 0),
    (MISTRAL, f"[TOOL_CALLS][{ONE} , {TWO}] so", " so", 2),
    (MISTRAL, f"[TOOL_CALLS][{SWAPPED}, {TWO}]", "", 2),
    (MISTRAL, f'[TOOL_CALLS][{ONE}, {TWO[:-1]}, "id": 3}}]', "", 2),
    (LLAMA, f"  <|python_tag|> {ONE}\n{TWO}", "", 2),
]


@pytest.mark.parametrize(("kind", "text", "content", "count"), CASES, ids=[text[:30] for _, text, _, _ in CASES])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_any_pieces_say_the_same(kind, text, content, count, size):
    reader, said, calls = CallReader(kind), "", []
    for start in range(0, len(text), size):
        more, found = reader.feed(text[start : start + size], final=False)
        said, calls = said + more, calls + found
    more, found = reader.feed("", final=True)
    said, calls = said + more, calls + found
    assert said == (text if content is None else content)
    whole = joined(calls)
    assert len(whole) == count == reader.calls
    for (name, arguments), want in zip(whole, (ONE, TWO), strict=False):
        assert name == json.loads(want)["name"] and json.loads(arguments) == json.loads(want)["arguments"]
    assert len({call.id for call in calls if call.name}) == count


def joined(pieces):
    """Name and arguments of each call; its name and id come with its first piece and never again."""
    calls = []
    for piece in pieces:
        assert (piece.name is None) == (piece.id is None) == (piece.index < len(calls))
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        assert piece.index == len(calls) - 1
        calls[-1][1] += piece.arguments
    return calls


CALLS = [
    (HERMES, f"<tool_call>{TWO}</tool_call>"),
    (MISTRAL, f"[TOOL_CALLS][{TWO}]"),
    (LLAMA, TWO.replace("arguments", "parameters")),
]


@pytest.mark.parametrize(("kind", "text"), CALLS, ids=[kind.name for kind, _ in CALLS])
def test_arguments_come_as_they_are_written(kind, text):
    reader, given = CallReader(kind), ""
    for place, character in enumerate(text):
        content, pieces = reader.feed(character, final=False)
        assert content == ""
        given += "".join(piece.arguments for piece in pieces)
        if not given:
            assert [piece.name for piece in pieces] in ([], ["say"])
        arguments = text.find("{", text.index("{") + 1)
        assert given == text[arguments : place + 1][: len('{"text": "ü ]"}')]


@pytest.mark.parametrize("size", [1, 1000])
def test_a_call_that_is_cut_off_has_the_arguments_that_came(size):
    for text, arguments in (
        ('<tool_call>{"name": "f", "arguments": {"a": "x', '{"a": "x'),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> on', '{"a": 1'),
    ):
        reader, found = CallReader(HERMES), []
        said = ""
        for start in range(0, len(text), size):
            more, pieces = reader.feed(text[start : start + size], final=start + size >= len(text))
            said, found = said + more, found + pieces
        assert joined(found) == [["f", arguments]] and said == (" on" if "on" in text[-3:] else "")


def test_one_call_at_most_where_so_asked():
    reader = CallReader(replace(MISTRAL, most=1))
    assert len(reader.feed(f"[TOOL_CALLS] [{ONE}, {TWO}]", final=True)[1]) == 1
    reader = CallReader(replace(HERMES, most=1))
    assert reader.feed(f"<tool_call>{ONE}</tool_call> and <tool_call>{TWO}</tool_call>", final=True)[0] == ""
