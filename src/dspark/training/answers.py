"""Who answers prompts: what is asked of a server or of an engine in this process, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from dspark.common.sampling_params import SamplingParams
from dspark.training.samples import Message


class Question(NamedTuple):
    """A conversation up to where the assistant speaks, with what its template is given beside the messages."""

    messages: Sequence[Message]
    tools: list[Any] | None = None
    template: Mapping[str, Any] = {}


class Answer(NamedTuple):
    """One answer: an assistant message, why it ended (stop, length, tool_calls, ...) and how many tokens it took."""

    message: Message
    ending: str
    tokens: int


class Refused(Exception):
    """This prompt gets no answer however often it is asked; others may."""


class Answerer(Protocol):
    """Answers conversations and continues texts, many at a time. Raises Refused, or UserError when nothing will do."""

    async def chat(self, question: Question, params: SamplingParams) -> Answer: ...

    async def complete(self, text: str, params: SamplingParams) -> Answer: ...
