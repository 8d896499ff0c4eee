"""Structured output, tools and the rest of OpenAI's fields as its SDK asks for them, over the tiny random pair."""

import json

import openai
import pytest
from serving import serving, tiny_core

from dspark.server.service import ServerConfig

MODEL = "tiny"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
TALK = [{"role": "user", "content": "add"}]
HERMES = (
    "{% if tools %}Tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}Call them so: "
    '<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>\n{% endif %}'
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.a }}</tool_call>{% endfor %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}


TOOLS = [tool("add", a={"type": "boolean"}), tool("stop", b={"enum": ["x", "y"]})]


@pytest.fixture(scope="module")
def served(tiny_pair):
    with serving(tiny_core(tiny_pair, template=HERMES), ServerConfig(name=MODEL)) as running:
        yield running


def chat(served, **fields):
    asked = {"model": MODEL, "messages": TALK, "max_completion_tokens": 200} | fields
    return served.openai.chat.completions.create(**asked)


def check(text):
    found = json.loads(text)
    assert set(found) == {"ok", "n"} and isinstance(found["ok"], bool) and 0 <= found["n"] <= 99


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 1, "n": 2}, {"temperature": 1}], ids=str)
def test_response_formats(served, fields):
    whole = chat(served, response_format=FORMAT, **fields)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    streamed = chat(served, response_format=FORMAT, stream=True, **fields)
    check("".join(c.choices[0].delta.content or "" for c in streamed if c.choices[0].index == 0))
    assert (
        chat(served, response_format={"type": "json_object"}, max_completion_tokens=5).choices[0].message.content[0]
        == "{"
    )
    assert chat(served, response_format={"type": "text"}, max_completion_tokens=3).choices[0].finish_reason == "length"


def test_guided_fields_of_completions(served):
    for fields, fits in (
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
        ({"guided_regex": "[0-9]{4}"}, lambda text: len(text) == 4 and text.isdigit()),
        ({"guided_grammar": 'root ::= "a" | "b"'}, {"a", "b"}.__contains__),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: check(text) is None),
        ({"response_format": FORMAT}, lambda text: check(text) is None),
    ):
        got = served.openai.completions.create(model=MODEL, prompt="x", max_tokens=200, extra_body=fields).choices[0]
        assert got.finish_reason == "stop" and fits(got.text), (fields, got.text)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called(served, stream):
    for choice, names in (
        ("required", {"add", "stop"}),
        ({"type": "function", "function": {"name": "stop"}}, {"stop"}),
    ):
        asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": 3, "stream": stream}
        got = chat(served, **asked)
        if stream:
            chunks = [chunk.choices[0] for chunk in got]
            pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            finish, content = chunks[-1].finish_reason, "".join(chunk.delta.content or "" for chunk in chunks)
            assert all(piece.index == 0 for piece in pieces) and not any(piece.id for piece in pieces[1:])
            calls = [pieces[0]]
            calls[0].function.arguments = "".join(piece.function.arguments for piece in pieces)
        else:
            calls, finish = got.choices[0].message.tool_calls, got.choices[0].finish_reason
            content = got.choices[0].message.content or ""
        assert finish == "tool_calls" and content == ""
        (call,) = calls
        assert call.function.name in names and call.id.startswith("call_") and call.type == "function"
        key, values = {"add": ("a", (True, False)), "stop": ("b", ("x", "y"))}[call.function.name]
        assert json.loads(call.function.arguments)[key] in values


def test_arguments_stream_as_they_are_written(tiny_pair):
    """The name comes first, then the arguments a few tokens at a time; the SDK puts them together."""
    tools = [tool("write", text={"type": "string", "pattern": "^[a-z]{40,60}$"})]
    asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    with serving(tiny_core(tiny_pair, template=HERMES), ServerConfig(name=MODEL), pace=0.0) as served:
        got = chat(served, **asked)
        (call,) = got.choices[0].message.tool_calls
        chunks = [chunk.choices[0].delta.tool_calls for chunk in chat(served, **asked, stream=True)]
        (first, *rest) = [one for calls in chunks for one in calls or []]
        assert first.function.name == "write" and first.id and len(first.function.arguments) < 20 and len(rest) > 5
        assert not any(one.id or one.function.name or one.type for one in rest)
        given = "".join(one.function.arguments for one in (first, *rest))
        assert given == call.function.arguments and 40 <= len(json.loads(given)["text"]) <= 60
        with served.openai.chat.completions.stream(model=MODEL, messages=TALK, **asked) as stream:
            deltas = [e.arguments_delta for e in stream if e.type == "tool_calls.function.arguments.delta"]
            (whole,) = stream.get_final_completion().choices[0].message.tool_calls
        assert "".join(deltas) == whole.function.arguments == given and whole.function.name == "write"
        total, cuts = got.usage.completion_tokens, []
        for count in range(8, total, max(1, total // 10)):
            short = chat(served, **asked, max_completion_tokens=count).choices[0]
            assert short.finish_reason == "length"
            cuts += [cut.function.arguments for cut in short.message.tool_calls or []]
        assert all(given.startswith(cut) for cut in cuts) and len({*cuts, given}) > 2


def test_tools_that_may_be_called_and_what_became_of_them(served):
    free = chat(served, tools=TOOLS, max_completion_tokens=5, temperature=0)
    assert free.choices[0].message.tool_calls is None and free.choices[0].finish_reason == "length"
    assert (
        free.usage.prompt_tokens
        > chat(served, tools=TOOLS, tool_choice="none", max_completion_tokens=1).usage.prompt_tokens
    )
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    told = [*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    told.append({"role": "tool", "tool_call_id": "call_1", "content": "8"})
    assert chat(served, messages=told, tools=TOOLS, max_completion_tokens=2).usage.completion_tokens == 2
    rendered = served.http.post("/tokenize", json={"messages": told}).json()["tokens"]
    assert "<tool_call>7</tool_call>" in served.http.post("/detokenize", json={"tokens": rendered}).json()["prompt"]


def test_best_of_is_the_likeliest(served):
    asked = {"model": MODEL, "prompt": "def", "max_tokens": 6, "seed": 1}
    each = served.openai.completions.create(**asked, n=4, logprobs=0).choices
    mean = {one.text: sum(one.logprobs.token_logprobs) / len(one.logprobs.token_logprobs) for one in each}
    got = served.openai.completions.create(**asked, n=2, best_of=4)
    assert [choice.text for choice in got.choices] == sorted(mean, key=mean.get, reverse=True)[:2]
    assert got.usage.completion_tokens == 24 and all(choice.logprobs is None for choice in got.choices)
    assert [choice.index for choice in got.choices] == [0, 1]


BAD = [
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "both say what the text"),
    ({"guided_json": {"type": "objekt"}}, "Invalid type"),
    ({"guided_regex": "(a"}, "unclosed group"),
    ({"guided_regex": "a" * 200_000}, "at most"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"tool_choice": "required"}, "tool_choice needs tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "none of the tools"),
    ({"tools": TOOLS, "response_format": FORMAT}, "exclude each other"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "strict"),
    ({"tools": [{"type": "function", "function": {"name": "no space here"}}]}, "name"),
    ({"tools": [tool("f", a={"type": "wrong"})], "tool_choice": "required"}, "Invalid type"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "arguments",
    ),
    ({"functions": []}, "functions is not known or not supported"),
    ({"audio": {}}, "audio is not known or not supported"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prediction": {}}, "prediction"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=[str(fields)[:50] for fields, _ in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400(served, fields, words, stream):
    body = {"model": MODEL, "messages": TALK, "max_tokens": 4, "stream": stream} | fields
    got = served.http.post("/v1/chat/completions", json=body)
    assert got.status_code == 400 and words in got.json()["error"]["message"], got.text


def test_bad_fields_of_completions(served):
    for fields, words in (
        ({"best_of": 1, "n": 2}, "best_of 1 is below n 2"),
        ({"best_of": 2, "stream": True}, "cannot be streamed"),
        ({"suffix": "x"}, "suffix"),
        ({"tools": TOOLS}, "tools"),
    ):
        got = served.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"} | fields)
        assert got.status_code == 400 and words in got.json()["error"]["message"], got.text


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ messages[0].content }}", "does not write tools"), ("{{ tools }}{{ messages[0].content }}", "in none of")],
)
def test_a_template_that_cannot_call_is_a_400(tiny_pair, template, words):
    with serving(tiny_core(tiny_pair, template=template), ServerConfig(name=MODEL)) as running:
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            chat(running, tools=TOOLS)
        assert caught.value.param == "tools"
        assert chat(running, tools=TOOLS, tool_choice="none", max_completion_tokens=1).choices
