"""What clients may ask: OpenAI's fields that this server honours, and the extensions, checked as they come in.

A field that is not here is refused, as OpenAI does, whether nobody knows it or this server cannot do it: an answer that
silently ignored what was asked for would be wrong. Fields that do not change the text are taken and unused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dspark.common.grammar import Grammar
from dspark.common.sampling_params import MAX_SEED, MAX_TOP_K, SamplingParams
from dspark.server.structured import Strict, Structured
from dspark.server.tools import MOST_TOOLS, Choice, Function, NamedTool, Tool

MAX_CHOICES = 128
MAX_STOPS = 64

Text = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(Strict):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI's network padding; there is none here


class Extensions(Strict):
    """What only this server knows; see SamplingParams."""

    acceptance: Literal["rejection", "coupled"] | None = None
    speculation: Annotated[int, Field(ge=0, strict=True)] | Literal["off"] | None = None
    speculation_group: Annotated[str, Field(max_length=64)] = ""
    priority: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    min_tokens_per_second: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    trace: bool = False
    deadline_ms: Annotated[int, Field(ge=1, le=10**9, strict=True)] | None = None  # from the request's arrival


class Sampling(Structured):
    """The fields that both kinds of completion share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions that other servers have in the same place.
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    dspark: Extensions = Field(default_factory=Extensions)
    # Taken and unused.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or {}:
            if not (token.isascii() and token.isdecimal() and len(token) < 12):
                raise ValueError(f"key {token[:40]!r} is not a token id; pass ids as /tokenize gives them")
        return bias

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; pass stream: true or leave it out")
        return self

    @property
    def choices(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """Texts generated for each prompt, of which the choices are the best."""
        return self.choices

    def params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        special: bool = False,
    ) -> list[SamplingParams]:
        """The sampling parameters of each text of one prompt. Text i of a seed s is drawn with seed s + i."""
        shared: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        shared |= self.dspark.model_dump(exclude={"deadline_ms"})
        shared["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None
        shared["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        shared["stop_token_ids"] = tuple(self.stop_token_ids or ())
        shared["top_k"] = max(self.top_k or 0, 0)  # -1 is "off" elsewhere
        shared["ignore_eos"] = bool(self.ignore_eos)
        shared |= {"grammar": grammar or self.grammar, "skip_special_tokens": not special}
        seeds = [None if self.seed is None else (self.seed + i) % (MAX_SEED + 1) for i in range(self.candidates)]
        shared |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        return [SamplingParams(seed=seed, **shared) for seed in seeds]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise ValueError("max_tokens 0 reads the prompt only; pass echo and logprobs with it, or 1 or more")
        if not self.prompt:
            raise ValueError("the prompt is empty; pass at least one token")
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError(f"best_of {self.best_of} is below n {self.choices}; pass {self.choices} or more")
        if self.stream and self.candidates > self.choices:
            raise ValueError("best_of above n cannot be streamed; leave out stream or best_of")
        if len(self.prompts) * self.candidates > MAX_CHOICES:
            asked = f"{len(self.prompts)} prompts with {self.candidates} texts each"
            raise ValueError(f"{asked} are more than {MAX_CHOICES} texts; send several requests")
        return self

    @property
    def candidates(self) -> int:
        return self.best_of or self.choices

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, however they were given."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    """A part of a message's content; models here read text only."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What was called, with JSON for arguments."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, arguments: str) -> str:
        try:
            if isinstance(json.loads(arguments or "{}"), dict):
                return arguments
        except (ValueError, RecursionError):
            pass
        raise ValueError("arguments are not the JSON of an object")


class Call(Strict):
    """A call that the assistant asked for in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn. What the template may want beside it (`name`, `tool_calls`, `tool_call_id`) goes to the template."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def as_template(self) -> dict[str, Any]:
        """The message as chat templates know it: text content, and `system` for OpenAI's newer `developer`."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        message = self.model_dump(exclude_none=True) | {"content": content}
        for call in message.get("tool_calls", ()):  # templates write the arguments themselves
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        return message | {"role": "system"} if self.role == "developer" else message


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # its older name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice needs tools; pass some or leave it out")
        if self.offered and self._constraints():
            raise ValueError("tools and a format for the text exclude each other; pass one of them or tool_choice none")
        if isinstance(self.tool_choice, NamedTool) and not self.forced:
            raise ValueError(f"tool_choice {self.tool_choice.function.name!r} is none of the tools; name one of them")
        if not self.forced and any(one.function.strict for one in self.offered):
            raise ValueError(
                "strict tools are kept where tool_choice is required or names one; choose so, or drop strict"
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may know of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced(self) -> list[Function]:
        """The functions of which one must be called; none where the model is free to answer."""
        if self.tool_choice == "required":
            return [tool.function for tool in self.offered]
        if isinstance(self.tool_choice, NamedTool):
            return [tool.function for tool in self.offered if tool.function.name == self.tool_choice.function.name]
        return []


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("pass either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Token]
