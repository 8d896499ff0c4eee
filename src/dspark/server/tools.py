"""Tools in a chat: what clients offer, how a model's template writes calls, and the grammar that forces one."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.common.grammar import Grammar
from dspark.engine.grammars import WHITESPACE
from dspark.server.errors import ApiError
from dspark.server.structured import Strict
from dspark.server.tool_calls import FORMATS, HERMES, LLAMA, MISTRAL, CallFormat

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
MOST_TOOLS = 128


class Function(Strict):
    """A function that the model may ask to be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """OpenAI's tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class Named(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """A choice of one function."""

    type: Literal["function"]
    function: Named


Choice = Literal["none", "auto", "required"] | NamedTool


def format_of(tokenizer: PreTrainedTokenizerBase | None, tools: list[dict[str, Any]]) -> CallFormat:
    """How the chat template has calls written, read from its own text. Raises ApiError 400 where it has none."""
    text = ""
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        text = tokenizer.get_chat_template(tools=tools)
    if "tools" not in text:
        raise ApiError(400, "the model's chat template does not write tools; leave tools out", param="tools")
    found = next((one for one in FORMATS if any(sign in text for sign in one.signs)), None)
    if found is None or any(sign in text for sign in found.others):
        known = ", ".join(one.name for one in FORMATS)
        raise ApiError(
            400, f"the model's chat template writes calls in none of {known}; leave tools out", param="tools"
        )
    return found


def forcing(
    kind: CallFormat, functions: list[Function], tokenizer: PreTrainedTokenizerBase, *, several: bool
) -> Grammar:
    """A text that is nothing but calls of these functions, one or, with `several`, any number."""
    arguments = "parameters" if kind.name == LLAMA.name else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, arguments: one.parameters or {"type": "object"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for one in functions
    ]
    call: dict[str, Any] = {"anyOf": calls} if len(calls) > 1 else calls[0]
    spaced = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    try:
        if kind.name == LLAMA.name:
            return Grammar.json_schema(call)
        if kind.name == MISTRAL.name:
            listed = {"type": "array", "items": call, "minItems": 1} | ({} if several else {"maxItems": 1}) | spaced
            return Grammar.lark(f"start: {_literal(kind.opening, tokenizer)} %json {json.dumps(listed)}")
        assert kind.name == HERMES.name
        more = '("\\n" call)*' if several else ""
        body = f'{_literal(kind.opening, tokenizer)} "\\n" arguments "\\n" {_literal(kind.closing, tokenizer)}'
        return Grammar.lark(f"start: call {more}\ncall: {body}\narguments: %json {json.dumps(call | spaced)}")
    except UserError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from error


def _literal(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text in Lark's notation; a special token by its number, for no text spells it."""
    token = tokenizer.get_vocab().get(text)
    return f"<[{token}]>" if token is not None and token in tokenizer.all_special_ids else json.dumps(text)
