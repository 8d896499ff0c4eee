"""OpenTelemetry traces: a span for each request, rounds as events, what a collector reads, and no collector at all."""

import contextlib
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import serving, tiny_core

from dspark.cli.main import main
from dspark.common.errors import UserError
from dspark.server import tracing as tracing_module
from dspark.server.service import ServerConfig
from dspark.server.tracing import MOST_EVENTS, Seldom, Tracing, open_tracing

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry is not installed: traces are NOT tested")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

SHORT = {"prompt": "def secret(", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A server, and the spans it has ended."""

    def __init__(self, served, exporter):
        self.served, self.exporter = served, exporter

    def spans(self, count):
        """The next `count` spans: one ends just after its answer."""
        self.served.until(lambda: len(self.exporter.get_finished_spans()) >= count)
        found = self.exporter.get_finished_spans()
        self.exporter.clear()
        assert len(found) == count
        return found

    def ask(self, path="/v1/completions", **body):
        headers = body.pop("headers", {})
        return self.served.http.post(path, json=SHORT | body, headers=headers)


@pytest.fixture(scope="module")
def traced(tiny_pair):
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), "default", "1.0")
    with serving(tiny_core(tiny_pair), ServerConfig(keys=("k name=alice",)), key="k", tracing=tracing) as served:
        yield Traced(served, exporter)


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_tells_of_a_request(traced, stream):
    got = traced.ask(stream=stream, headers={"x-request-id": "abc"})
    (span,) = traced.spans(1)
    told = span.attributes
    assert span.name == "POST /v1/completions" and span.kind.name == "SERVER" and span.parent is None
    assert told["http.response.status_code"] == 200 and told["gen_ai.request.model"] == "default"
    assert told["gen_ai.operation.name"] == "text_completion" and told["dspark.key"] == "alice"
    assert told["gen_ai.usage.output_tokens"] == 24 and told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["dspark.request_id"] == "abc" and told["dspark.ttft_s"] > 0
    assert "secret" not in span.to_json()
    if stream:
        return
    said = got.json()["choices"][0]["dspark"]
    assert got.json()["usage"]["prompt_tokens"] == told["gen_ai.usage.input_tokens"]
    for name in ("drafted", "verified", "accepted"):
        assert said[name] == told[f"dspark.{name}"] == sum(event.attributes[f"dspark.{name}"] for event in span.events)
    assert said["drafted"] > 0 and round(said["tokens_per_round"], 3) == told["dspark.tokens_per_round"]
    assert len(span.events) == said["rounds"] + 1  # the commit that ends the prefill
    assert sum(event.attributes["dspark.committed"] for event in span.events) == 24


def test_the_callers_trace_goes_on(traced):
    traced.ask(headers={"traceparent": PARENT})
    traced.ask(headers={"traceparent": "nonsense"})
    inside, alone = traced.spans(2)
    assert f"{inside.context.trace_id:032x}" in PARENT and f"{inside.parent.span_id:016x}" in PARENT
    assert alone.parent is None


def test_what_is_not_traced(traced):
    traced.ask(headers={"traceparent": PARENT[:-1] + "0"})  # the caller's trace leaves this out
    for path in ("/health", "/ready", "/metrics"):
        assert traced.served.http.get(path).status_code == 200
    assert traced.served.http.get("/nowhere").status_code == 404
    (span,) = traced.spans(1)
    assert span.name == "GET" and "http.route" not in span.attributes  # no name for every path that somebody thinks of


def test_refusals_are_no_failures_of_the_server_and_texts_are_told_apart(traced):
    assert traced.ask(headers={"Authorization": "Bearer x"}).status_code == 401
    assert traced.ask(temperature=9).status_code == 400
    assert traced.ask(n=2).status_code == 200
    *refused, two = traced.spans(3)
    assert [span.attributes["http.response.status_code"] for span in refused] == [401, 400]
    assert all(span.status.status_code.name == "UNSET" and not span.events for span in refused)
    assert {event.attributes["dspark.choice"] for event in two.events} == {0, 1}
    assert two.attributes["gen_ai.response.finish_reasons"] == ("length", "length")


def test_a_stream_that_breaks_off_is_an_error(traced):
    with_deadline = traced.ask(max_tokens=480, stream=True, dspark={"deadline_ms": 60})
    assert with_deadline.status_code in (200, 504) and "deadline_exceeded" in with_deadline.text
    (span,) = traced.spans(1)
    assert span.status.status_code.name == "ERROR" and span.attributes["error.type"] == "deadline_exceeded"


def test_events_are_bounded(traced):
    traced.ask(max_tokens=MOST_EVENTS + 20, dspark={"speculation": "off"})
    (span,) = traced.spans(1)
    assert len(span.events) == MOST_EVENTS and span.attributes["dspark.events_untold"] == 20
    assert span.dropped_events == 0


@contextlib.contextmanager
def collector(status=200):
    """What an OTLP collector listens on, and the bodies it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_collector_gets_them(tiny_pair, monkeypatch, by_variable):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with collector() as (url, got):
        if by_variable:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        tracing = open_tracing(None if by_variable else url, "default", "1.0")
        with serving(tiny_core(tiny_pair), ServerConfig(), tracing=tracing) as served:
            assert served.http.post("/v1/completions", json=SHORT).status_code == 200
        # the server's end has sent what was left
    ((path, kind, body),) = got
    assert path == "/v1/traces" and kind == "application/x-protobuf" and b"secret" not in body
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    told = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert told["service.name"] == "mine" and told["service.version"] == "1.0"
    (span,) = resource.scope_spans[0].spans
    assert span.name == "POST /v1/completions" and {event.name for event in span.events} == {"round"}


@pytest.mark.parametrize("how", ["gone", "hangs"])
def test_a_dead_collector_hurts_nobody(tiny_pair, monkeypatch, how):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")  # ms: it tries at once
    monkeypatch.setattr(tracing_module, "CLOSE_SECONDS", 0.05)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if how == "gone":
            listening.close()
        tracing = open_tracing(url, "default", "1.0")
        with serving(tiny_core(tiny_pair), ServerConfig(), tracing=tracing) as served:
            for _ in range(3):
                assert served.http.post("/v1/completions", json=SHORT).status_code == 200
        assert sending().is_alive()  # the server has ended, and did not wait for it


def sending():
    """The thread that sends spans, the newest."""
    return [thread for thread in threading.enumerate() if thread.name == "OtelBatchSpanRecordProcessor"][-1]


def test_complaints_are_seldom():
    seldom = Seldom(3600)
    record = logging.makeLogRecord({"msg": "Failed to export"})
    assert [seldom.filter(record) for _ in range(3)] == [True, False, False]


def test_off_unless_asked_for(monkeypatch):
    for name in tracing_module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert open_tracing(None, "m", "1") is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing("http://127.0.0.1:1", "m", "1") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    with pytest.raises(UserError, match="'ftp://x', which is no http:// URL; pass one"):
        open_tracing("ftp://x", "m", "1")


def test_without_the_extra_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # which the command sets
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    assert main(["serve", "--trace-url", "http://127.0.0.1:4318"]) == 2
    said = capsys.readouterr().err
    assert said == "error: this needs opentelemetry, which is not installed; pip install 'dspark[tracing]'\n"
