"""What clients may ask: OpenAI's fields that this server honours, and the extensions, checked as they come in.

A field that is not here is refused, as OpenAI does, whether nobody knows it or this server cannot do it: an answer that
silently ignored `tools` or `response_format` would be wrong. Fields that do not change the text are taken and unused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dspark.common.sampling_params import MAX_SEED, SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 64

Text = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Refuses fields that it does not have."""

    model_config = ConfigDict(extra="forbid")


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


class Sampling(Strict):
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
    top_k: Annotated[int, Field(ge=-1)] | None = None
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

    def params(self, *, max_tokens: int | None, logprobs: int | None) -> list[SamplingParams]:
        """The sampling parameters of each choice of one prompt. Choice i of a seed s is drawn with seed s + i."""
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
        seeds = [None if self.seed is None else (self.seed + i) % (MAX_SEED + 1) for i in range(self.choices)]
        return [SamplingParams(max_tokens=max_tokens, logprobs=logprobs, seed=seed, **shared) for seed in seeds]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of an echoed prompt are not computed; leave out echo or logprobs")
        if not self.prompt:
            raise ValueError("the prompt is empty; pass at least one token")
        if len(self.prompts) * self.choices > MAX_CHOICES:
            asked = f"{len(self.prompts)} prompts with {self.choices} choices each"
            raise ValueError(f"{asked} are more than {MAX_CHOICES} texts; send several requests")
        return self

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


class ChatMessage(BaseModel):
    """One turn. What the template may want beside it (`name`, `tool_calls`, `tool_call_id`) goes to the template."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def as_template(self) -> dict[str, Any]:
        """The message as chat templates know it: text content, and `system` for OpenAI's newer `developer`."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        message = self.model_dump(exclude_none=True) | {"content": content}
        return message | {"role": "system"} if self.role == "developer" else message


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # its older name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


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
