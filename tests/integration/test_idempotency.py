"""`Idempotency-Key` as clients see it: one text for a key, however often and whenever it is asked for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Slow, serving, tiny_core

from dspark.server.results import MEMORY, FileResults
from dspark.server.service import ServerConfig

BODY = {"prompt": "def", "max_tokens": 12, "temperature": 1, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "add"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def kept(tiny_pair):
    core = tiny_core(tiny_pair)
    slow = Slow(core)
    keys = ("one name=a", "two name=a")  # whose names are alike: they are apart all the same
    results = FileResults(MEMORY, seconds=60, most_bytes=1 << 20)
    config = ServerConfig(keys=keys, most_answer_bytes=20_000, request_seconds=20)
    with serving(core, config, key="one", results=results) as served:
        yield served, slow


def post(served, key, body=BODY, path="/v1/completions", **headers):
    return served.http.post(path, json=body, headers={"Idempotency-Key": key, **headers})


def texts(served):
    """How many texts the engine has been asked for."""
    return served.ask(lambda core: core.intake._ids.__reduce__()[1][0])


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_answer_without_another_text(kept, path, body, stream):
    served, _ = kept
    key = f"{path} {stream}"
    first = post(served, key, body | {"stream": stream}, path)
    count = texts(served)
    again = post(served, key, body | {"stream": stream}, path)
    assert first.status_code == again.status_code == 200 and first.content == again.content
    assert first.headers["content-type"] == again.headers["content-type"]
    assert "Idempotent-Replayed" not in first.headers and again.headers["Idempotent-Replayed"] == "true"
    assert texts(served) == count
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    other = post(served, key + "!", body | {"stream": stream}, path)
    assert other.content != first.content


def test_an_answer_that_is_there_needs_no_place(kept):
    served, slow = kept
    first, slow.left = post(served, "full"), 0
    with ThreadPoolExecutor(16) as pool:
        inside = [pool.submit(post, served, f"full {index}", BODY | {"n": 3}) for index in range(3)]
        served.until(lambda: served.service.gate.inside == 9)
        assert post(served, "full").content == first.content
        assert post(served, "full?").status_code == 429
        slow.left = None
        assert [one.result().status_code for one in inside] == [200] * 3


def test_another_request_under_the_same_key(kept):
    served, _ = kept
    post(served, "used")
    for got in (post(served, "used", BODY | {"max_tokens": 13}), post(served, "used", CHAT, "/v1/chat/completions")):
        assert got.status_code == 422 and got.json()["error"]["code"] == "idempotency_key_reused"
    mine = post(served, "used").json()["id"]
    theirs = post(served, "used", Authorization="Bearer two").json()["id"]
    assert mine != theirs  # keys belong to who sends them


def test_keys_that_are_none(kept):
    served, _ = kept
    for key in ("", "x" * 256, "\xff"):
        assert (
            served.http.post(
                "/v1/completions", json=BODY, headers=[(b"Idempotency-Key", key.encode("latin-1"))]
            ).status_code
            == 400
        )


def test_repetitions_at_the_same_time_wait_for_the_first(kept):
    served, slow = kept
    slow.left = 2
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(post, served, "same time", BODY) for _ in range(4)]
        served.until(lambda: slow.left == 0)
        assert post(served, "same time", BODY | {"n": 2}).status_code == 422
        assert served.service.gate.inside == 1
        slow.left = None
        answers = [one.result() for one in asked]
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 3


def test_when_the_first_leaves_the_next_one_makes_it(kept):
    served, slow = kept
    slow.left = 2
    body = BODY | {"stream": True, "max_tokens": 100}
    with ThreadPoolExecutor() as pool:
        with served.http.stream("POST", "/v1/completions", json=body, headers={"Idempotency-Key": "left"}) as answer:
            lines = answer.iter_lines()  # which closes the answer when it is dropped
            next(lines)
            waiting = pool.submit(post, served, "left", body)
            served.until(lambda: _middleware(served)._waiting == 1)
        slow.left = None
        got = waiting.result()
    assert got.text.endswith("data: [DONE]\n\n") and "Idempotent-Replayed" not in got.headers
    assert post(served, "left", body).content == got.content


def test_failures_are_not_kept(kept):
    served, slow = kept
    for stream in (False, True):
        slow.left = 2
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(post, served, f"fails {stream}", BODY | {"stream": stream})
            served.until(lambda: slow.left == 0)
            slow.fail, slow.left = FloatingPointError(), None
            failed = asked.result()
        assert failed.status_code == (200 if stream else 500)
        again = post(served, f"fails {stream}", BODY | {"stream": stream})
        assert again.status_code == 200 and "step_failed" in failed.text and "step_failed" not in again.text
    assert post(served, "bad", BODY | {"top_p": 7}).status_code == 400
    assert post(served, "bad").status_code == 200


def test_an_answer_that_is_too_large_is_made_again(kept):
    served, _ = kept
    body = BODY | {"max_tokens": 200, "logprobs": 5, "n": 2}
    first, again = post(served, "large", body), post(served, "large", body)
    assert first.status_code == again.status_code == 200 and len(first.content) > 20_000
    assert "Idempotent-Replayed" not in again.headers


def test_nothing_is_held_in_the_end(kept):
    served, _ = kept
    middleware = _middleware(served)
    assert middleware._making == {} and middleware._waiting == 0


def _middleware(served):
    layer = served.app.middleware_stack
    while type(layer).__name__ != "Idempotency":
        layer = layer.app
    return layer
