"""The web application: OpenAI's endpoints and those that operators need, over one service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.common.errors import UserError
from dspark.common.grammar import Grammar
from dspark.common.sampling_params import SamplingParams
from dspark.engine.engine import Engine
from dspark.server import playground
from dspark.server.answers import ChatForm, Form, Piece, TextForm, Usage, best
from dspark.server.calls import Calls, call_of
from dspark.server.direct import DirectRoute
from dspark.server.errors import RESPONSES, ApiError, ClientGone, install
from dspark.server.idempotency import Idempotency
from dspark.server.keys import Keys
from dspark.server.limits import Bodies, Full
from dspark.server.metrics import Metrics
from dspark.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from dspark.server.results import Results
from dspark.server.service import ServerConfig, Service, package_version
from dspark.server.stream import EventStream, listening
from dspark.server.tool_calls import CallFormat
from dspark.server.tools import NamedTool, forcing, format_of
from dspark.server.tracing import Traced, Tracing

Job = tuple[list[int], SamplingParams]
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # beside JSON
STATUS: dict[int | str, dict[str, Any]] = {503: {"description": "`status` says what is wrong"}}


def create_app(
    engine: Engine,
    config: ServerConfig | None = None,
    results: Results | None = None,
    *,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over `engine`; its Service is `app.state.service`. `results` keeps answers by Idempotency-Key."""
    service = Service(engine, config or ServerConfig())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.metrics.watch_lag())
        yield
        watching.cancel()
        if results is not None:
            await results.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None}  # they need a CDN
    app = FastAPI(title="dspark", version=package_version(), lifespan=lifespan, responses=RESPONSES, **pages)
    app.state.service = service
    install(app)
    _completions(app, service)
    _texts(app, service)
    _operations(app, service)
    if service.config.playground:
        playground.install(app)
    if results is not None:
        app.add_middleware(
            Idempotency,
            results=results,
            most_bytes=service.config.most_answer_bytes,
            wait_seconds=service.config.request_seconds,
        )
    app.add_middleware(Bodies, most_bytes=service.config.most_body_bytes, seconds=service.config.body_seconds)
    free = playground.PATHS if service.config.playground else ()
    app.add_middleware(Full, gate=service.gate)
    app.add_middleware(Keys, keys=service.config.api_keys, rates=service.config.rates, free=free)
    if service.config.origins:
        origins, headers = list(service.config.origins), ["authorization", "content-type"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    app.add_middleware(
        Counted, metrics=service.metrics, known={str(getattr(route, "path", "")) for route in app.routes}
    )
    if tracing is not None:
        app.add_middleware(Traced, tracing=tracing)
    app.add_middleware(Calls)  # the last one added sees a request first
    return app


def _completions(app: FastAPI, service: Service) -> None:
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        service.check_model(body.model)
        service.gate.check(len(body.prompts) * body.candidates)
        picking = body.candidates > body.choices
        params = body.params(
            max_tokens=body.max_tokens,
            logprobs=0 if picking and body.logprobs is None else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        prompts = [await service.tokens(prompt) for prompt in body.prompts]
        jobs = [(tokens, one) for tokens in prompts for one in params]
        form = TextForm(service.config.name, service.fingerprint, service.decode)
        if body.echo:
            texts = [p if isinstance(p, str) else _decoded(service, p) for p in body.prompts]
            form.echoed = [text for text in texts for _ in range(body.choices)]
            if body.logprobs is not None:
                form.scored = [tokens[0] for tokens in prompts for _ in range(body.choices)]
        form.silent = body.logprobs is None
        return await _answer(service, request, body, jobs, form)

    async def chat(body: ChatRequest, request: Request) -> Response:
        """The assistant's next message."""
        service.check_model(body.model)
        service.gate.check(body.choices)
        asked = body.max_completion_tokens or body.max_tokens
        form, grammar = ChatForm(service.config.name, service.fingerprint, service.decode), None
        if body.offered:
            form.calls, grammar = await asyncio.to_thread(_calling, service, body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        special = form.calls is not None
        params = body.params(max_tokens=asked, logprobs=logprobs, grammar=grammar, special=special)
        tokens = await service.chat_tokens(body.messages, body.offered)
        return await _answer(service, request, body, [(tokens, one) for one in params], form)

    for path, endpoint in (("/v1/completions", completions), ("/v1/chat/completions", chat)):
        options: dict[str, Any] = {"methods": ["POST"], "responses": STREAMED, "route_class_override": DirectRoute}
        app.router.add_api_route(path, endpoint, **options)


def _calling(service: Service, body: ChatRequest) -> tuple[CallFormat, Grammar | None]:
    """How calls of the offered tools are written, and the grammar of a text that must hold one."""
    tokenizer = service.engine.core.tokenizer
    kind = format_of(tokenizer, [tool.model_dump(exclude_none=True) for tool in body.offered])
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    kind = kind if several else replace(kind, most=1)
    if not body.forced:
        return kind, None
    assert tokenizer is not None, "a format was read from its template"
    return kind, forcing(kind, body.forced, tokenizer, several=several)


async def _answer(service: Service, request: Request, body: Sampling, jobs: Sequence[Job], form: Form) -> Response:
    """The response to a checked request."""
    usage = Usage()
    call = call_of(request.scope)
    pieces = service.pieces(jobs, usage, choices=body.candidates, call=call, deadline_ms=body.dspark.deadline_ms)

    left = service.metrics.cancelled
    if body.stream:
        told = usage if body.stream_options is not None and body.stream_options.include_usage else None
        return EventStream(pieces, form, choices=len(jobs), usage=told, left=left)
    whole = [Piece(place, "") for place in range(len(jobs))]
    try:
        async with listening(request.receive):
            async for piece in pieces:
                whole[piece.choice].take(piece)
    except ClientGone:
        left()
        raise
    finally:
        await pieces.aclose()
    return JSONResponse(form.whole(best(whole, body.choices, body.candidates), usage))


def _texts(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        service.check_model(body.model)
        if body.messages is not None:
            tokens = await service.chat_tokens(body.messages)
        else:
            tokens = await service.tokens(body.prompt or "")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens, special ones included."""
        service.check_model(body.model)
        return {"prompt": _decoded(service, body.tokens)}

    def model() -> dict[str, Any]:
        return {
            "id": service.config.name,
            "object": "model",
            "created": started,
            "owned_by": "dspark",
            "max_model_len": service.context,
        }

    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model of this name."""
        service.check_model(name)
        return model()


def _operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=STATUS)
    async def health() -> Response:
        """Live: 503 when only a restart helps."""
        trouble = service.trouble
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/ready", responses=STATUS)
    async def ready() -> Response:
        """Whether requests should be sent here."""
        trouble = service.trouble or ("the server is shutting down" if service.gate.closed else None)
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        await service.refresh()
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of this package."""
        return {"version": package_version()}


def _decoded(service: Service, tokens: Sequence[int]) -> str:
    tokenizer, size = service.engine.core.tokenizer, service.engine.core.target.vocab_size
    if tokenizer is None:
        raise UserError("the model has no tokenizer; there are no texts of tokens here")
    for token in tokens:
        if token >= size:
            raise ApiError(400, f"token {token} is outside the model's vocabulary of {size} tokens", param="tokens")
    return tokenizer.decode(list(tokens))


class Counted:
    """Counts answers by endpoint and status; a path nobody serves is `other`, so that labels stay few."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: Collection[str]):
        """`known` are the paths of routes: a request refused on its way has not met its route."""
        self.app, self.metrics, self.known = app, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # set by the router where a path is served
                path = scope["path"] if scope["path"] in self.known else "other"
                self.metrics.answered(str(getattr(route, "path", path)), message["status"])
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
