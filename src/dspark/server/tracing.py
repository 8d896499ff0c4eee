"""OpenTelemetry traces, by option: a span for each request, the rounds of its texts as events, and no text at all."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.engine.request import Commit
from dspark.server.calls import QUIET, Call, call_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

EXTRA = "tracing"
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
MOST_EVENTS = 128  # of a span; what comes later is counted
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
CLOSE_SECONDS = 3.0  # for spans not sent yet, when the server ends
COMPLAIN_SECONDS = 60.0
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
TOLD = ("key", "queue_s", "ttft_s", "tokens_per_round", "preemptions", "replayed")  # of the log's line


def open_tracing(url: str | None, model: str, version: str) -> Tracing | None:
    """Traces to the OTLP collector at `url` (`http://host:4318`; a path is taken as it is), else where VARIABLES say.

    None if neither says anything or `$OTEL_SDK_DISABLED` is true. Spans are sent by a thread of their own; a collector
    that is slow or gone loses them. Raises UserError for another kind of URL, or where the extra is missing.
    """
    given = url or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    if given is None or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if not given.startswith(("http://", "https://")):
        raise UserError(
            f"traces go to {given!r:.200}, which is no http:// URL; pass one, such as http://127.0.0.1:4318"
        )
    trace = require("opentelemetry.sdk.trace.export", EXTRA)
    exporter = require(EXPORTER, EXTRA)
    logging.getLogger(EXPORTER).addFilter(Seldom(COMPLAIN_SECONDS))
    endpoint = f"{url.rstrip('/')}/v1/traces" if url and urlsplit(url).path in ("", "/") else url
    return Tracing(trace.BatchSpanProcessor(exporter.OTLPSpanExporter(endpoint)), model, version)


class Seldom(logging.Filter):
    """Lets one line through every so many seconds: a collector that is gone is no news."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line may pass."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.seconds
        return True


class Tracing:
    """Opens a span for each request and hands it to `processor` when the request is over."""

    def __init__(self, processor: SpanProcessor, model: str, version: str):
        sdk, resources = require("opentelemetry.sdk.trace", EXTRA), require("opentelemetry.sdk.resources", EXTRA)
        own = resources.Resource.create({"service.name": "dspark", "service.version": version})
        resource = own.merge(resources.OTELResourceDetector().detect())  # what the environment says goes first
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dspark", version)
        self._api = require("opentelemetry.trace", EXTRA)
        self._extract = require("opentelemetry.propagate", EXTRA).extract
        self.model = model

    def open(self, call: Call, headers: list[tuple[bytes, bytes]]) -> Span:
        """A span that begins now, under the one that `traceparent` names if the client sent one."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span: Span = self._tracer.start_span(
            call.method, self._extract(carrier), self._api.SpanKind.SERVER, record_exception=False
        )
        return span

    def failed(self, span: Span, why: str) -> None:
        """Say that a request did not get what it was promised."""
        span.set_attribute("error.type", why)
        span.set_status(self._api.Status(self._api.StatusCode.ERROR))

    def close(self) -> None:
        """Send what is left, for CLOSE_SECONDS at most: the SDK itself waits longer for a collector that is gone."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)


class Rounds:
    """The rounds of one request's texts, as events of its span."""

    def __init__(self, span: Span):
        self._span = span
        self.drafted = self.verified = self.accepted = 0
        self.untold = 0
        self.reasons: list[str] = []
        self._told = 0

    def take(self, choice: int, commit: Commit) -> None:
        """A commit: what a round drafted, checked, accepted and committed."""
        self.drafted += commit.drafted
        self.verified += commit.verified
        self.accepted += commit.accepted
        if commit.finish_reason:
            self.reasons.append(commit.finish_reason)
        if self._told == MOST_EVENTS:
            self.untold += 1
            return
        self._told += 1
        counts = {
            "dspark.choice": choice,
            "dspark.drafted": commit.drafted,
            "dspark.verified": commit.verified,
            "dspark.accepted": commit.accepted,
            "dspark.committed": len(commit.token_ids),
        }
        self._span.add_event("round", counts)

    @property
    def attributes(self) -> dict[str, Any]:
        """Their sums."""
        told: dict[str, Any] = {name: getattr(self, name) for name in ("drafted", "verified", "accepted")}
        told = {f"dspark.{name}": value for name, value in told.items()} | {"dspark.events_untold": self.untold}
        return told | {"gen_ai.response.finish_reasons": self.reasons}


class Traced:
    """The layer under Calls, where traces are wanted: a span from a request's first byte to its answer's last."""

    def __init__(self, app: ASGIApp, tracing: Tracing):
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; what probes and scrapers ask is not traced, nor what the caller's trace leaves out."""
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self.app(scope, receive, send)
            return
        call = call_of(scope)
        span = self.tracing.open(call, scope["headers"])
        if span.is_recording():
            call.trace_id = f"{span.get_span_context().trace_id:032x}"
            call.rounds = Rounds(span)
        try:
            await self.app(scope, receive, send)
        finally:
            if call.rounds is not None:
                self._tell(span, call, getattr(scope.get("route"), "path", None))
            span.end()

    def _tell(self, span: Span, call: Call, route: str | None) -> None:
        line = call.line
        told: dict[str, Any] = {"http.request.method": call.method, "http.response.status_code": call.status}
        told |= {"dspark.request_id": call.id} | {f"dspark.{name}": line[name] for name in TOLD if name in line}
        if route is not None:  # a path that nobody serves would be a name of its own
            span.update_name(f"{call.method} {route}")
            told["http.route"] = route
        if call.prompt_tokens and call.rounds is not None:
            told["gen_ai.operation.name"] = OPERATIONS.get(call.path, "other")
            told["gen_ai.request.model"] = self.tracing.model
            told["gen_ai.usage.input_tokens"] = call.prompt_tokens
            told["gen_ai.usage.output_tokens"] = call.completion_tokens
            told |= call.rounds.attributes
        span.set_attributes(told)
        if call.error is not None and (call.status >= 500 or call.status < 400):  # in a stream, after its 200
            self.tracing.failed(span, call.error)
        elif call.status >= 500:
            self.tracing.failed(span, str(call.status))
