"""What a server refuses, lets go of and survives: keys, a full queue, clients that leave, failing steps, the end."""

import asyncio
import contextlib
import functools
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import openai
import pytest
import torch
from serving import Slow, serving, tiny_core

from dspark.server.service import ServerConfig, Service

LONG = {"prompt": "def", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "def", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def small(tiny_pair):
    """Two texts at once, one more may wait; two keys."""
    core = tiny_core(tiny_pair, template=None, max_running=2, pages=120)
    slow = Slow(core)
    with serving(core, ServerConfig(queue=1, keys=("first", "second")), key="second") as running:
        yield running, slow


def test_keys(small):
    served, _ = small
    for header in ("", "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first second"):
        got = httpx2.post(served.url + "/v1/completions", json=SHORT, headers={"Authorization": header})
        assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="third", max_retries=0).models.list()
    for key in ("first", "second"):
        got = httpx2.post(served.url + "/v1/completions", json=SHORT, headers={"Authorization": f"Bearer {key}"})
        assert got.status_code == 200
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert httpx2.get(served.url + path).status_code == 200


def test_a_base_model_has_no_chat(small):
    served, _ = small
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        served.openai.chat.completions.create(model="default", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_worked_for(small, stream):
    served, slow = small
    body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: {len(body)}\r\n"
    slow.left = 3
    with socket.create_connection(httpx2.URL(served.url).netloc.decode().split(":")) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        if stream:
            assert b"200 OK" in client.recv(100)
        served.until(lambda: slow.left == 0)
    served.until(lambda: served.service.gate.inside == 0)  # the server has seen it go, in the middle of a step
    steps, slow.left = served.core.timings.steps, None
    served.until(lambda: served.core.idle)
    assert served.core.timings.steps - steps <= 1  # the one that was held
    served.ask(lambda core: core.check_integrity())
    assert served.core.admission.pool.available == served.core.admission.pool.capacity


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(small):
    served, slow = small
    assert served.http.post("/v1/completions", json=SHORT | {"n": 4}).status_code == 400  # never fits
    slow.left = 0
    with ThreadPoolExecutor() as pool:
        inside = [pool.submit(served.http.post, "/v1/completions", json=SHORT | {"n": n}) for n in (2, 1)]
        served.until(lambda: served.service.gate.inside == 3)
        got = served.http.post("/v1/completions", json=SHORT)
        assert got.status_code == 429 and got.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(got.headers["Retry-After"]) <= 60
        refused_unread(served)
        slow.left = None
        assert [one.result().status_code for one in inside] == [200, 200]
    told = served.http.get("/metrics").text
    assert "dspark_requests_refused_total 2.0" in told
    assert 'dspark_requests_total{endpoint="/v1/completions",status="429"} 2.0' in told


def refused_unread(served):
    """Refused before the body came; the connection takes another request after it, however long the body is."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer second\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(httpx2.URL(served.url).netloc.decode().split(":")) as client:
        client.sendall(head.encode() + b"{")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += client.recv(10_000).lower()
        assert answer.startswith(b"http/1.1 429") and b"retry-after: " in answer and b"connection: close" not in answer
        client.sendall(b"x" * 99_999 + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")


def test_the_queue_is_a_32nd_of_the_places_unless_somebody_says():
    for running, given, wanted in ((8, None, 1), (64, None, 2), (256, None, 8), (64, 0, 0), (64, 300, 300)):
        core = SimpleNamespace(
            config=SimpleNamespace(max_running=running), target=SimpleNamespace(dtype="", device=torch.device("cpu"))
        )
        service = Service(SimpleNamespace(core=core), ServerConfig(queue=given))
        assert (service.gate.running, service.gate.queue) == (running, wanted)


def test_a_failing_step_fails_its_requests_alone(small):
    served, slow = small
    slow.left = 3
    with served.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
        slow.fail, slow.left = FloatingPointError("secret of the inside"), None
        events = [line[6:] for line in running.iter_lines() if line.startswith("data: ")]
    error = json.loads(events[-1])["error"]
    assert error["code"] == "step_failed" and "secret" not in error["message"]
    slow.fail = MemoryError()
    got = served.http.post("/v1/completions", json=SHORT)
    assert got.status_code == 500 and got.json()["error"]["type"] == "server_error"
    assert served.http.post("/v1/completions", json=SHORT).status_code == 200
    assert served.http.get("/health").status_code == 200
    assert "dspark_engine_failed_steps_total 2.0" in served.http.get("/metrics").text


def test_a_slow_body_is_not_waited_for(tiny_pair):
    with serving(tiny_core(tiny_pair), ServerConfig(body_seconds=0.2)) as served:
        with socket.create_connection(httpx2.URL(served.url).netloc.decode().split(":")) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b"408" in client.recv(100)
        assert served.http.post("/v1/completions", json=SHORT).status_code == 200


def test_an_engine_that_stopped_is_not_healthy(tiny_pair):
    with serving(tiny_core(tiny_pair), ServerConfig()) as served:
        served.service.engine.close()
        assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 503
        got = served.http.post("/v1/completions", json=SHORT)
        assert got.status_code == 503 and got.json()["error"]["code"] == "engine_stopped"
        assert served.http.get("/metrics").status_code == 200


def test_a_device_that_hangs_is_not_healthy(tiny_pair):
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    with serving(core, ServerConfig(stuck_seconds=0.05)) as served, ThreadPoolExecutor() as pool:
        slow.left = 1
        running = pool.submit(served.http.post, "/v1/completions", json=SHORT)
        served.until(lambda: served.service.trouble is not None)
        got = served.http.get("/health")
        assert got.status_code == 503 and "hang" in got.json()["status"]
        assert served.http.get("/ready").status_code == 503
        slow.left = None
        assert running.result().status_code == 200
        assert served.http.get("/health").status_code == 200


def test_cors_is_for_named_origins(tiny_pair):
    with serving(tiny_core(tiny_pair), ServerConfig(origins=("http://page",), keys=("k",))) as served:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (("http://page", "http://page"), ("http://other", None)):
            got = served.http.options("/v1/completions", headers=ask | {"Origin": origin})
            assert got.headers.get("access-control-allow-origin") == allowed


@contextlib.contextmanager
def command(pair, *options):
    """`dspark serve` in a process of its own, and what it printed about itself."""
    arguments = ["serve", str(pair.target), "--drafter", str(pair.drafter), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen([sys.executable, "-m", "dspark.cli.main", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        facts = {}
        for line in process.stdout:
            name, _, value = line.partition(":")
            facts[name] = value.strip()
            if name == "address":
                break
        yield process, facts
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_requests_finish(tiny_pair):
    with command(tiny_pair) as (process, facts):
        assert "context 512" in facts["model"] and facts["planner"] == "auto" and "cpu" in facts["device"], facts
        assert facts["texts"] == "64 at once, 2 more may wait" and facts["traces"] == "none"
        body = LONG | {"stream": True, "n": 8}
        with httpx2.stream("POST", facts["address"] + "/completions", json=body, timeout=60) as stream:
            events = stream.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0


def test_sigterm_lets_waiting_requests_finish(tiny_pair):
    """One text has the only place and three wait: all four are whole before the server ends; nobody else comes in."""
    with command(tiny_pair, "--max-running", "1", "--queue", "3") as (process, facts), ThreadPoolExecutor() as pool:
        url = facts["address"]
        ask = functools.partial(httpx2.post, url + "/completions", json=LONG, timeout=60)
        with httpx2.Client() as late:
            asked = [pool.submit(ask) for _ in range(4)]
            while "dspark_num_requests_waiting 3.0" not in late.get(url.replace("/v1", "/metrics")).text:
                assert not any(one.done() for one in asked)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx2.TransportError):  # the connection that was open may be closed by now
                assert late.post(url + "/completions", json=SHORT).status_code == 503
        assert [one.result().status_code for one in asked] == [200] * 4
        assert {one.result().json()["usage"]["completion_tokens"] for one in asked} == {480}
        assert process.wait(60) == 0


def test_the_grace_period_ends(tiny_pair):
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    with serving(core, ServerConfig(), grace=0) as served:
        slow.left = 3
        with (
            pytest.raises(httpx2.TransportError),
            served.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer,
        ):
            served.server.should_exit = True
            list(answer.iter_lines())
        slow.left = None


def test_many_clients_that_come_and_go_leave_nothing(tiny_pair):
    core = tiny_core(tiny_pair, pages=60)  # far too few for all at once: texts are preempted

    async def client(http, index):
        body = LONG | {"stream": index % 2 == 0, "max_tokens": 5 + 7 * index % 90, "n": 1 + index % 3, "seed": index}
        body["temperature"] = index % 2
        if index % 3:
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200
            return answer.text.count("length")
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as answer:
            async for _ in answer.aiter_lines():
                return 0

    async def main(url):
        async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
            return await asyncio.gather(*(client(http, index) for index in range(24)))

    with serving(core, ServerConfig(queue=64)) as served:
        done = asyncio.run(main(served.url))
        assert done == [0 if index % 3 == 0 else 1 + index % 3 for index in range(24)]
        served.until(lambda: core.idle)
        assert served.core.admission.pool.available == served.core.admission.pool.capacity
        assert served.service.gate.inside == 0
