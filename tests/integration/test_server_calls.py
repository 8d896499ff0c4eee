"""What a server tells about each request, and the limits of a request's rate and time."""

import contextlib
import json
import logging
import socket
import time

import httpx2
import openai
import pytest
from serving import Slow, serving, tiny_core

from dspark.server.connections import PatientProtocol
from dspark.server.logs import JsonLines, TextLines
from dspark.server.service import ServerConfig

SHORT = {"prompt": "def", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 480}


class Kept(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(json.loads(JsonLines().format(record)))
        text = TextLines().format(record)
        assert "\n" not in text and all(f"{name}=" in text for name in record.fields)


@pytest.fixture
def log():
    kept, logger = Kept(), logging.getLogger("dspark.requests")
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept.lines
    logger.removeHandler(kept)
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def limited(tiny_pair):
    """Three keys with rates of their own, and a core whose steps can be held."""
    keys = ("free name=free", "few requests-per-minute=2", "small name=s tokens-per-minute=20")
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    with serving(core, ServerConfig(keys=keys, tokens_per_minute=100_000, queue=64), key="free") as served:
        yield served, slow


def auth(key, **headers):
    return {"Authorization": f"Bearer {key}", **headers}


def test_ids_come_back(limited):
    served, _ = limited
    assert served.http.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for given in ({}, {"x-request-id": "a b"}, {"x-request-id": "x" * 200}):
        assert served.http.get("/health", headers=given).headers["x-request-id"].startswith("req_")
    got = served.openai.completions.create(model="default", **{k: SHORT[k] for k in ("prompt", "max_tokens")})
    assert got._request_id.startswith("req_")
    refused = httpx2.get(served.url + "/v1/models", headers={"x-request-id": "no-key"})
    assert refused.status_code == 401 and refused.headers["x-request-id"] == "no-key"


def test_requests_per_minute(limited):
    served, _ = limited
    ask = lambda: served.http.post("/v1/completions", json=SHORT, headers=auth("few"))  # noqa: E731
    got = ask()
    assert got.headers["x-ratelimit-limit-requests"] == "2" and got.headers["x-ratelimit-remaining-requests"] == "1"
    assert ask().status_code == 200
    refused = ask()
    assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert served.http.get("/v1/models", headers=auth("few")).status_code == 200  # only work is counted
    assert served.http.post("/v1/completions", json=SHORT).status_code == 200  # others are not hit
    with pytest.raises(openai.RateLimitError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="few", max_retries=0).completions.create(
            model="default", prompt="a"
        )


def test_tokens_per_minute(limited):
    served, _ = limited
    got = served.http.post("/v1/completions", json=SHORT, headers=auth("small"))
    used = got.json()["usage"]["total_tokens"]
    assert got.headers["x-ratelimit-limit-tokens"] == "20"
    after = served.http.post("/v1/completions", json=SHORT | {"max_tokens": 1, "n": 30}, headers=auth("small"))
    assert after.status_code == 429 and "20 tokens per minute" in after.json()["error"]["message"]
    assert int(after.headers["x-ratelimit-remaining-tokens"]) in (20 - used, 20 - used + 1)
    free = served.http.post("/v1/completions", json=SHORT)
    assert free.headers["x-ratelimit-limit-tokens"] == "100000"


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_a_request_within_one_step(limited, log, stream):
    served, slow = limited
    body = LONG | {"stream": stream, "n": 2, "dspark": {"deadline_ms": 300}}
    slow.left = 2  # then the steps are held until the deadline has passed

    def release():
        served.until(lambda: served.service.gate.inside == 0)
        steps, slow.left = served.core.timings.steps, None
        served.until(lambda: served.core.idle)
        assert served.core.timings.steps - steps <= 1
        served.ask(lambda core: core.check_integrity())

    if stream:
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        error = json.loads(events[-1])["error"]
    else:
        got = served.http.post("/v1/completions", json=body)
        assert got.status_code == 504
        error = got.json()["error"]
    assert error["code"] == "deadline_exceeded" and "0.3 s" in error["message"]
    release()
    served.until(lambda: log)
    assert log[-1]["error"] == "deadline_exceeded" and log[-1]["total_s"] >= 0.29  # uvloop counts in milliseconds


def test_the_servers_own_deadline(tiny_pair):
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    with serving(core, ServerConfig(request_seconds=0.2)) as served:
        slow.left = 1
        got = served.http.post("/v1/completions", json=LONG | {"dspark": {"deadline_ms": 60_000}})
        assert got.status_code == 504
        slow.left = None


def test_one_line_a_request(limited, log):
    served, _ = limited
    body = SHORT | {"prompt": "secret text", "n": 2}
    got = served.http.post("/v1/completions", json=body, headers={"x-request-id": "one"})
    served.http.post("/v1/completions", json={"prompt": []}, headers=auth("small"))
    httpx2.post(served.url + "/v1/completions", json=SHORT)
    served.http.get("/nothing%0A%20here?prompt=secret")
    served.http.get("/health")
    served.until(lambda: len(log) == 4)
    line = log[0]
    assert (line["id"], line["status"], line["key"], line["path"]) == ("one", 200, "free", "/v1/completions")
    usage = got.json()["usage"]
    assert [line["prompt_tokens"], line["completion_tokens"]] == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"]
    assert line["tokens_per_round"] >= 1 or usage["completion_tokens"] == 2
    assert [(entry["status"], entry.get("key"), entry.get("error")) for entry in log[1:]] == [
        (400, "s", "http_400"),
        (401, None, "invalid_api_key"),
        (404, "free", "http_404"),
    ]
    assert "secret" not in json.dumps(log)


def test_prompts_are_logged_where_the_operator_says_so(tiny_pair, log):
    with serving(tiny_core(tiny_pair), ServerConfig(log_prompts=True)) as served:
        served.http.post("/v1/completions", json=SHORT | {"prompt": ["one two", "three"], "n": 2})
        served.until(lambda: log)
        assert log[0]["prompts"] == ["one two", "three"]


def test_connections_that_do_nothing_are_closed(tiny_pair):
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    with serving(core, ServerConfig(), protocol=PatientProtocol.within(head=0.3, read=60)) as served:
        where = httpx2.URL(served.url).netloc.decode().split(":")
        for start in (b"", b"POST /v1/completions HTTP/1.1\r\nHost"):
            with socket.create_connection(where, timeout=30) as client:
                client.sendall(start)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(100) == b""
        slow.left = 1
        with served.http.stream("POST", "/v1/completions", json=SHORT | {"stream": True, "max_tokens": 30}) as answer:
            time.sleep(0.5)  # a request that is served is not idle
            slow.left = None
            assert list(answer.iter_lines())[-2] == "data: [DONE]"


def test_an_answer_that_is_not_read_is_given_up(tiny_pair):
    core = tiny_core(tiny_pair)
    with serving(core, ServerConfig(), protocol=PatientProtocol.within(head=15, read=0.3)) as served:
        where = httpx2.URL(served.url).netloc.decode().split(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((where[0], int(where[1])))
        body = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 20, "temperature": 1}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with client:
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert b"200 OK" in client.recv(100)
            served.until(lambda: served.service.gate.inside == 0)
        assert served.http.post("/v1/completions", json=SHORT).status_code == 200


def test_models_are_named_never_pointed_at(limited, tiny_pair):
    served, _ = limited
    for name in (str(tiny_pair.target), "../../etc/passwd", "file:///etc/passwd", "Qwen/Qwen3-4B", ""):
        for path in ("/v1/completions", "/tokenize"):
            got = served.http.post(path, json={"prompt": "a", "model": name})
            assert got.status_code == 404 and got.json()["error"]["code"] == "model_not_found"
        assert served.http.get(f"/v1/models/{name or '%00'}").status_code == 404
    for field in ("drafter", "target", "trust_remote_code", "lora", "chat_template", "adapter_path"):
        assert served.http.post("/v1/completions", json=SHORT | {field: "/tmp/x"}).status_code == 400
        assert served.http.post("/v1/completions", json=SHORT | {"dspark": {field: "/tmp/x"}}).status_code == 400


def test_deep_bodies_are_refused(limited):
    served, _ = limited
    for body in ("[" * 10_000, '{"prompt":' * 70 + "1" + "}" * 70):
        got = served.http.post("/v1/completions", content=body)
        assert got.status_code == 400 and got.json()["error"]["code"] == "too_deep"


def test_numbers_too_large_for_anything_are_refused_not_run(limited):
    """One that no float holds would fail the step, and the others in it."""
    served, _ = limited
    for field in ("top_k", "max_tokens", "seed", "n"):
        body = f'{{"prompt": "a", "temperature": 0, "{field}": {"9" * 400}}}'
        got = served.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert got.status_code == (200 if field == "max_tokens" else 400), (field, got.text)
