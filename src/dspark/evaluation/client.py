"""Asks any OpenAI-compatible server for streamed texts and notes when each piece came, as `vllm bench serve` does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.training.endpoints import checked_url, said

CONNECT = 10.0  # s to reach the server
DRAFTS, DRAFTED, ACCEPTED = "num_drafts", "num_draft_tokens", "num_accepted_tokens"


@dataclass(frozen=True)
class Question:
    """One request of a load: what is asked, how much may be written, and when it is due."""

    prompt: str
    max_tokens: int
    due: float = 0.0  # s from the start of the load


@dataclass
class Answer:
    """What became of one request; times on the performance counter, in seconds."""

    start: float = 0.0  # the request went out
    came: list[float] = field(default_factory=list)  # an event with a choice in it arrived
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None  # why this is no answer

    @property
    def ttft(self) -> float:
        """To the first event with a choice in it."""
        return self.came[0] - self.start

    @property
    def latency(self) -> float:
        """To the last event with a choice in it."""
        return self.came[-1] - self.start

    @property
    def itl(self) -> list[float]:
        """Between neighbouring events: an event may bring several tokens."""
        return [after - before for before, after in zip(self.came, self.came[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """From the first event to the last, for each token after the first; 0 for one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def read(self, events: list[tuple[float, bytes]]) -> None:
        """Take a stream's events, each with the time it came."""
        ended = False
        for stamp, raw in events:
            data = b"".join(line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:"))
            if not data:
                continue  # a comment, as some servers send to keep a connection open
            if data == b"[DONE]":
                ended = True
                continue
            told = json.loads(data)
            if told.get("error"):
                self.error = str(told["error"].get("message", told["error"]))[:200]
            for choice in (told.get("choices") or ())[:1]:
                self.came.append(stamp)
                self.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                ended = ended or choice.get("finish_reason") is not None
            usage = told.get("usage") or {}
            self.prompt_tokens = usage.get("prompt_tokens") or self.prompt_tokens
            self.output_tokens = usage.get("completion_tokens") or self.output_tokens
        self.output_tokens = self.output_tokens or len(self.came)  # of a server that does not count
        if self.error is None and not (self.came and ended):
            self.error = "the stream ended before the text did" if self.came else "the stream held no text"


class Client:
    """One server, asked for completions or for chat. Use it as a context: it keeps connections open."""

    def __init__(
        self,
        url: str,
        *,
        chat: bool = False,
        key: str = "",
        timeout: float = 600.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """`extra` are fields of every request; `timeout` in seconds is the longest silence of a server."""
        self.url = checked_url(url)
        self.chat, self.model = chat, ""
        self.extra = dict(extra or {})
        self.httpx = require("httpx2", "train")
        self.http = self.httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.httpx.Timeout(timeout, connect=CONNECT, pool=None),
            limits=self.httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    def body(self, question: Question) -> dict[str, Any]:
        """The request, streamed, with the usage at its end."""
        stream = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            messages = [{"role": "user", "content": question.prompt}]
            return stream | {"messages": messages, "max_completion_tokens": question.max_tokens} | self.extra
        return stream | {"prompt": question.prompt, "max_tokens": question.max_tokens} | self.extra

    async def ask(self, question: Question) -> Answer:
        """The answer, or what went wrong; never raises for what a server does."""
        answer, events = Answer(), []
        path = "chat/completions" if self.chat else "completions"
        content = json.dumps(self.body(question)).encode()
        headers = {"Content-Type": "application/json"}
        answer.start = time.perf_counter()
        try:
            async with self.http.stream("POST", f"{self.url}/{path}", content=content, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    answer.error = f"{response.status_code}: {said(response)}"
                    return answer
                left = b""
                async for part in response.aiter_raw():  # stamped now, read at the end: reading takes time as well
                    stamp = time.perf_counter()
                    *whole, left = (left + part).replace(b"\r\n", b"\n").split(b"\n\n")
                    events += [(stamp, event) for event in whole]
            answer.read([*events, (time.perf_counter(), left)] if left.strip() else events)
        except self.httpx.TransportError as error:
            answer.error = f"{type(error).__name__} {error}".strip()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            answer.error = f"malformed event: {type(error).__name__} {error}"
        return answer

    async def meet(self, model: str | None) -> str:
        """The model all requests ask for: `model`, or the only one the server has. Raises UserError."""
        try:
            response = await self.http.get(f"{self.url}/models", timeout=CONNECT)
            served = [entry["id"] for entry in response.json()["data"]]
        except (self.httpx.TransportError, self.httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise UserError(f"{self.url} does not answer ({why}); start the server or correct --url") from error
        except (ValueError, KeyError, TypeError):
            served = []
        if model is None and len(served) != 1:
            raise UserError(f"{self.url} names {len(served)} models {served[:5]}; pass --model with one it has")
        self.model = model or served[0]
        return self.model

    async def speculation(self) -> dict[str, list[float]] | None:
        """The server's own counts of speculation so far, of dspark and of vLLM; None where it tells none."""
        try:
            response = await self.http.get(f"{self.url.removesuffix('/v1')}/metrics", timeout=CONNECT)
        except self.httpx.TransportError:
            return None
        found: dict[str, list[float]] = {}
        for line in response.text.splitlines():
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            _, split, count = name.replace(":", "_").partition("_spec_decode_")
            if split and not line.startswith("#") and not count.endswith("_created"):
                found.setdefault(count.removesuffix("_total"), []).append(float(value))
        return found if DRAFTS in found and ACCEPTED in found else None
