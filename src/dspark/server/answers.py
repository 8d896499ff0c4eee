"""The JSON of answers, whole and in pieces, as OpenAI writes it, with each text's speculation beside it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dspark.engine.request import Commit, RequestStatistics, TokenLogprob, TokenTrace
from dspark.server.tool_calls import CallFormat, CallPiece, CallReader

LEAST_LOGPROB = -9999.0  # JSON has no infinity
HALF = "\ufffd"
Decode = Callable[[int], str]


@dataclass
class Piece:
    """Something to add to one choice."""

    choice: int
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    statistics: RequestStatistics | None = None  # with the last piece
    trace: list[TokenTrace] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # with the first piece, of the prompt but its first token

    @staticmethod
    def of(choice: int, commits: Sequence[Commit]) -> Piece:
        """What some commits of one text, at least one, add to its choice."""
        first, last = commits[0], commits[-1]
        logprobs = trace = None
        if first.logprobs is not None:
            logprobs = [one for commit in commits for one in commit.logprobs or ()]
        if first.trace is not None:
            trace = [one for commit in commits for one in commit.trace or ()]
        return Piece(
            choice,
            "".join([commit.text for commit in commits]),
            logprobs,
            last.finish_reason,
            last.statistics if last.finish_reason else None,
            trace,
            first.prompt_logprobs,
        )

    def take(self, more: Piece) -> None:
        """Put what follows behind it."""
        self.text += more.text
        if more.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *more.logprobs]
        if more.trace is not None:
            self.trace = [*(self.trace or []), *more.trace]
        if more.prompt_logprobs is not None:
            self.prompt_logprobs = more.prompt_logprobs
        self.finish_reason, self.statistics = more.finish_reason, more.statistics


def best(texts: Sequence[Piece], choices: int, candidates: int) -> list[Piece]:
    """Of every prompt's candidates the `choices` likeliest by mean log-probability of their tokens, likeliest first."""
    if choices == candidates:
        return list(texts)

    def mean(piece: Piece) -> float:
        found = piece.logprobs or ()
        return sum(one.logprob for one in found) / max(len(found), 1)

    kept = []
    for start in range(0, len(texts), candidates):
        kept += sorted(texts[start : start + candidates], key=mean, reverse=True)[:choices]
    return [replace(piece, choice=index) for index, piece in enumerate(kept)]


@dataclass
class Usage:
    """Tokens of one request: every prompt once, every text."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def json(self) -> dict[str, Any]:
        """As OpenAI counts them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Form(Protocol):
    """How one endpoint writes what it has to say."""

    def head(self, choices: int) -> list[dict[str, Any]]:
        """What a stream begins with, one for each choice."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        ...

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""
        ...

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last event of a stream whose client wants to know."""
        ...


def statistics_json(statistics: RequestStatistics) -> dict[str, Any]:
    """What speculation did for one text. A trimmed token was never checked, a rejected one was and fell."""
    return {
        "tokens_per_round": round(statistics.tokens_per_round, 4),
        "rounds": statistics.rounds,
        "drafted": statistics.drafted,
        "verified": statistics.verified,
        "accepted": statistics.accepted,
        "trimmed": statistics.drafted - statistics.verified,
        "rejected": statistics.verified - statistics.accepted,
        "verified_at": statistics.verified_at,
        "accepted_at": statistics.accepted_at,
        "preemptions": statistics.preemptions,
        "first_token_seconds": _seconds(statistics.arrived, statistics.first_token),
        "seconds": _seconds(statistics.arrived, statistics.finished),
    }


def _seconds(since: float, until: float | None) -> float | None:
    return None if until is None else round(until - since, 6)


def trace_json(one: TokenTrace, decode: Decode) -> dict[str, Any]:
    """Where one token came from; what does not apply is left out."""
    told: dict[str, Any] = {"id": one.token_id, "text": one.text, "kind": one.kind}
    if one.confidence is not None:
        told |= {"slot": one.slot, "confidence": round(one.confidence, 4)}
    if one.rejected is not None:
        told["rejected"] = decode(one.rejected)
    return told


@dataclass
class _Base:
    """What both endpoints' answers have in common."""

    model: str
    fingerprint: str
    decode: Decode
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    prefix = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, piece: Piece, **said: Any) -> dict[str, Any]:
        choice = {"index": piece.choice, **said, "finish_reason": piece.finish_reason}
        told = statistics_json(piece.statistics) if piece.statistics is not None else {}
        if piece.trace is not None:
            told["tokens"] = [trace_json(one, self.decode) for one in piece.trace]
        return choice | {"dspark": told} if told else choice


@dataclass
class ChatForm(_Base):
    """/v1/chat/completions."""

    calls: CallFormat | None = None  # how the model writes calls of tools, where it was offered any
    prefix = "chatcmpl"
    _readers: dict[int, CallReader] = field(default_factory=dict)

    def head(self, choices: int) -> list[dict[str, Any]]:
        """The assistant's turn begins."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._object("chat.completion.chunk", [self._choice(Piece(index, ""), delta=delta, logprobs=None)])
            for index in range(choices)
        ]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """More of a message."""
        content, calls, piece = self._read(piece)
        delta: dict[str, Any] = {"content": content} if content or not (piece.finish_reason or calls) else {}
        if calls:
            delta["tool_calls"] = [{"index": call.index, **call.json()} for call in calls]
        choice = self._choice(piece, delta=delta, logprobs=self._logprobs(piece.logprobs))
        return self._object("chat.completion.chunk", [choice])

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Whole messages."""
        made = []
        for text in choices:
            content, calls, piece = self._read(text)
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                message |= {"content": content or None, "tool_calls": [call.json() for call in calls]}
            made.append(self._choice(piece, message=message, logprobs=self._logprobs(piece.logprobs)))
        return self._object("chat.completion", made) | {"usage": usage.json()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """No choice, only the count."""
        return self._object("chat.completion.chunk", []) | {"usage": usage.json()}

    def _read(self, piece: Piece) -> tuple[str, list[CallPiece], Piece]:
        """The content and the calls of a piece; a text that ends by itself with a call finishes with `tool_calls`."""
        if self.calls is None:
            return piece.text, [], piece
        reader = self._readers.setdefault(piece.choice, CallReader(self.calls))
        content, calls = reader.feed(piece.text, final=piece.finish_reason is not None)
        if reader.calls and piece.finish_reason == "stop":
            piece = replace(piece, finish_reason="tool_calls")
        return content, calls, piece

    def _logprobs(self, found: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        content = [
            self._token(one.token_id, one.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        whole = HALF not in text  # a token may be a part of a character
        return {
            "token": text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(text.encode("utf-8")) if whole else None,
        }


@dataclass
class TextForm(_Base):
    """/v1/completions."""

    echoed: Sequence[str] = ()  # the prompt of each choice, to stand before its text
    scored: Sequence[int] = ()  # the first token of each echoed prompt whose tokens' log-probabilities are told
    silent: bool = False  # log-probabilities chose among candidates; the client did not ask for them
    prefix = "cmpl"
    _offset: dict[int, int] = field(default_factory=dict)  # characters of each choice so far

    def head(self, choices: int) -> list[dict[str, Any]]:
        """The prompts, if they are to be echoed; those with log-probabilities stand in their choice's first piece."""
        return [
            self._object("text_completion", [self._choice(Piece(index, ""), text=text, logprobs=None)])
            for index, text in enumerate(() if self.scored else self.echoed)
        ]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """More of a text."""
        before = self.echoed[piece.choice] if piece.prompt_logprobs is not None else ""
        choice = self._choice(piece, text=before + piece.text, logprobs=self._logprobs(piece))
        return self._object("text_completion", [choice])

    def whole(self, choices: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """Whole texts."""
        before = self.echoed or [""] * len(choices)
        made = [
            self._choice(piece, text=prompt + piece.text, logprobs=self._logprobs(piece))
            for prompt, piece in zip(before, choices, strict=True)
        ]
        return self._object("text_completion", made) | {"usage": usage.json()}

    def usage(self, usage: Usage) -> dict[str, Any]:
        """No choice, only the count."""
        return self._object("text_completion", []) | {"usage": usage.json()}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.logprobs is None or self.silent:
            return None
        told: list[tuple[int, TokenLogprob | None]] = [(one.token_id, one) for one in piece.logprobs]
        if piece.prompt_logprobs is not None:  # of the first token nobody can say how likely it was
            told = [(self.scored[piece.choice], None), *((one.token_id, one) for one in piece.prompt_logprobs), *told]
        texts = [self.decode(token) for token, _ in told]
        start = self._offset.get(piece.choice, 0)
        ends = list(itertools.accumulate(map(len, texts), initial=start))
        self._offset[piece.choice] = ends[-1]
        return {
            "tokens": texts,
            "token_logprobs": [one and max(one.logprob, LEAST_LOGPROB) for _, one in told],
            "top_logprobs": [one and self._top(one) for _, one in told],
            "text_offset": ends[:-1],
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens by text; of several that are parts of characters and read alike, the likeliest."""
        found: dict[str, float] = {}
        for token, value in one.top:
            found.setdefault(self.decode(token), max(value, LEAST_LOGPROB))
        return found
