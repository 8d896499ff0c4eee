"""Calls found in texts that arrive in any pieces; what only looks like a call stays content."""

import json
from dataclasses import replace

import pytest

from dspark.server.tool_calls import HERMES, LLAMA, MISTRAL, CallReader

ONE, TWO = '{"name": "add", "arguments": {"a": 1}}', '{"name": "say", "arguments": {"text": "ü ]"}}'
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
    assert said == content and len(calls) == count == reader.calls
    for call, want in zip(calls, (ONE, TWO), strict=False):
        assert call.name == json.loads(want)["name"] and json.loads(call.arguments) == json.loads(want)["arguments"]
    assert len({call.id for call in calls}) == count


def test_one_call_at_most_where_so_asked():
    reader = CallReader(replace(MISTRAL, most=1))
    assert len(reader.feed(f"[TOOL_CALLS] [{ONE}, {TWO}]", final=True)[1]) == 1
    reader = CallReader(replace(HERMES, most=1))
    assert reader.feed(f"<tool_call>{ONE}</tool_call> and <tool_call>{TWO}</tool_call>", final=True)[0] == ""
