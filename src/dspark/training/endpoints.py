"""Any number of OpenAI-compatible servers as one: the least busy is asked, and what fails is asked again elsewhere."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.common.sampling_params import SamplingParams
from dspark.training.answers import Answer, Question, Refused
from dspark.training.samples import Message

LONGEST_PAUSE = 60.0  # seconds
CONNECT = 10.0  # seconds to reach a server
BUSY = (429, 503)  # the server wants fewer requests: it rests, its neighbours do not
HOPELESS = (401, 403, 404, 405)  # so will every other request be answered
PASSING = (408, 409, 425)  # of the refusals, those that may not be repeated


class Failed(Exception):
    """An attempt that may go well the next time, after `wait` seconds if the server named them."""

    def __init__(self, reason: str, *, all_wait: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.all_wait, self.wait = all_wait, wait


@dataclass(eq=False)
class Endpoint:
    """One server: its URL up to /v1, how many requests it is answering, and until when it is left alone."""

    url: str
    busy: int = 0
    failures: int = 0  # since its last answer
    rests_until: float = 0.0


class Endpoints:
    """Answers through servers. Use it as a context: it keeps connections open."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str = "",
        timeout: float = 600.0,
        retries: int = 8,
        pause: float = 0.5,
    ) -> None:
        """`pause` seconds before the first repetition, then twice as many, and so on."""
        self.endpoints = [Endpoint(checked_url(url)) for url in dict.fromkeys(urls)]
        self.retries, self.pause = retries, pause
        self.model, self.answered, self.retried = "", 0, 0
        self.httpx = require("httpx2", "train")
        self.client = self.httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.httpx.Timeout(timeout, connect=CONNECT, pool=None),
            limits=self.httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Endpoints:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def meet(self, model: str | None = None) -> str:
        """Ask every server what it serves; returns the model all will be asked for. Raises UserError."""
        for endpoint in self.endpoints:
            served = await self.served(endpoint)
            model = model or (served[0] if len(served) == 1 else None)
            if model is None or (served and model not in served):
                wanted = f"not {model!r}" if model else "several models or none" if served else "no model it would name"
                raise UserError(f"{endpoint.url} serves {wanted} (it has {served}); pass --model with one it has")
        self.model = model or ""
        return self.model

    async def served(self, endpoint: Endpoint) -> list[str]:
        """The models of a server; empty for one that does not say."""
        try:
            response = await self.client.get(f"{endpoint.url}/models", timeout=CONNECT)
        except (self.httpx.TransportError, self.httpx.InvalidURL) as error:
            raise UserError(
                f"{endpoint.url} does not answer ({error or type(error).__name__}); start the server "
                "(`dspark serve`, vLLM, SGLang, ...) or correct --url"
            ) from error
        if response.status_code in (401, 403):
            raise UserError(f"{endpoint.url} wants another API key ({response.status_code}); name it with --key-env")
        try:
            return [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    async def chat(self, question: Question, params: SamplingParams) -> Answer:
        """The assistant's next message."""
        body: dict[str, Any] = {"messages": list(question.messages)}
        if question.tools:
            body["tools"] = question.tools
        if question.template:
            body["chat_template_kwargs"] = dict(question.template)
        return await self.ask("chat/completions", body, params, chat_answer)

    async def complete(self, text: str, params: SamplingParams) -> Answer:
        """What follows a text."""
        return await self.ask("completions", {"prompt": text}, params, text_answer)

    async def ask(
        self, path: str, body: dict[str, Any], params: SamplingParams, read: Callable[[Any], Answer]
    ) -> Answer:
        """Post until a server answers, with growing pauses. Raises Refused, or UserError when none does any more."""
        request = {"model": self.model, **body, **sampling_fields(params)}
        answered, reason = self.answered, ""
        for attempt in range(self.retries + 1):
            endpoint = await self.free()
            endpoint.busy += 1
            try:
                answer = await self.post(endpoint, path, request, read)
                endpoint.failures, self.answered = 0, self.answered + 1
                return answer
            except Failed as failure:
                reason, elsewhere = str(failure), failure.all_wait and len(self.endpoints) > 1
                wait = min(self.pause * 2 ** max(attempt, endpoint.failures), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
                wait = wait if failure.wait is None else failure.wait
                endpoint.failures += 1
                if failure.all_wait:
                    endpoint.rests_until = time.monotonic() + wait
            finally:
                endpoint.busy -= 1
            if attempt < self.retries:
                self.retried += 1
                await asyncio.sleep(0.0 if elsewhere else wait)
        if self.answered > answered:  # others were answered meanwhile: it is this prompt
            raise Refused(reason)
        raise UserError(f"{self.retries + 1} attempts failed, the last: {reason}; what is done is kept")

    async def post(
        self, endpoint: Endpoint, path: str, request: dict[str, Any], read: Callable[[Any], Answer]
    ) -> Answer:
        """One attempt. Raises Failed for what may go well the next time, else Refused or UserError."""
        try:
            response = await self.client.post(f"{endpoint.url}/{path}", json=request)
        except (self.httpx.ConnectError, self.httpx.ConnectTimeout) as error:
            raise Failed(
                f"{endpoint.url} cannot be reached ({error or 'no connection in time'})", all_wait=True
            ) from error
        except self.httpx.TransportError as error:
            raise Failed(f"{endpoint.url} broke off ({type(error).__name__} {error})") from error
        if response.status_code == 200:
            try:
                return read(response.json())
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise Failed(f"{endpoint.url} sent no answer ({type(error).__name__} {error})") from error
        reason = f"{endpoint.url} says {response.status_code}: {said(response)}"
        if response.status_code in HOPELESS:
            raise UserError(f"{reason}; correct --url, --model or --key-env. What is done is kept")
        if response.status_code in BUSY:
            raise Failed(reason, all_wait=True, wait=seconds(response.headers.get("retry-after")))
        if 400 <= response.status_code < 500 and response.status_code not in PASSING:
            raise Refused(reason)
        raise Failed(reason)

    async def free(self) -> Endpoint:
        """The least busy server that does not rest, once there is one. Nothing else runs between this and its use."""
        while True:
            now = time.monotonic()
            endpoint = min(self.endpoints, key=lambda e: (max(e.rests_until - now, 0.0), e.busy))
            if endpoint.rests_until <= now:
                return endpoint
            await asyncio.sleep(endpoint.rests_until - now)


def checked_url(url: str) -> str:
    """A server's URL up to where its version is named: /v1 where none is. Raises UserError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--url {url!r} is no URL of a server; write it like http://localhost:8000/v1")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """Sampling settings as a request has them; what not every server knows only where it is used."""
    fields = {name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    return fields | {name: getattr(params, name) for name in ("top_k", "min_p") if getattr(params, name)}


def chat_answer(reply: Any) -> Answer:
    """The answer in a chat completion. Raises KeyError and the like for one that is malformed."""
    choice = reply["choices"][0]
    found = choice["message"]
    message: Message = {"role": "assistant", "content": cleaned(found.get("content"))}
    thought = found.get("reasoning_content") or found.get("reasoning")
    if thought:
        message["reasoning_content"] = cleaned(thought)
    if found.get("tool_calls"):
        message["tool_calls"] = found["tool_calls"]
    return Answer(message, str(choice.get("finish_reason") or "unknown"), tokens_of(reply))


def text_answer(reply: Any) -> Answer:
    """The answer in a completion."""
    choice = reply["choices"][0]
    message = {"role": "assistant", "content": cleaned(choice["text"])}
    return Answer(message, str(choice.get("finish_reason") or "unknown"), tokens_of(reply))


def tokens_of(reply: Any) -> int:
    """Tokens written, as the server counts them."""
    return int((reply.get("usage") or {}).get("completion_tokens") or 0)


def cleaned(text: str | None) -> str:
    """Text that UTF-8 can hold: a server that cuts an emoji in two may send half a surrogate pair."""
    return (text or "").encode("utf-8", "replace").decode("utf-8")


def said(response: Any) -> str:
    """What a server gives as the reason, on one line."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        reason = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        reason = response.text
    return " ".join(str(reason).split())[:200]


def seconds(header: str | None) -> float | None:
    """Retry-After in seconds, where it is a number."""
    try:
        return min(max(float(header or ""), 0.0), LONGEST_PAUSE)
    except ValueError:
        return None
