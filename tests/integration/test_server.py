"""The server as clients see it: the official SDK against a real uvicorn, over a tiny random pair."""

import json
import math

import openai
import pytest
import torch
from serving import serving, tiny_core
from transformers import AutoModelForCausalLM

from dspark.common.sampling_params import SamplingParams
from dspark.engine.llm import LLM
from dspark.server.service import ServerConfig

MODEL = "tiny"
PROMPT = "def add(a, b):"
GREEDY = {"model": MODEL, "prompt": PROMPT, "temperature": 0}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "add"}]}]


@pytest.fixture(scope="module")
def served(tiny_pair):
    config = ServerConfig(name=MODEL, most_body_bytes=20_000, most_prompt_tokens=300)
    with serving(tiny_core(tiny_pair), config) as running:
        yield running


@pytest.fixture(scope="module")
def direct(tiny_pair):
    """What the engine itself says."""
    llm = LLM(tiny_pair.target, tiny_pair.drafter, device="cpu", pages=200)
    return lambda prompt, **fields: llm.generate(prompt, SamplingParams(**fields))[0]


def test_a_completion_is_the_engines_text(served, direct):
    got = served.openai.completions.create(**GREEDY, max_tokens=24, user="somebody")
    want = direct(PROMPT, max_tokens=24, temperature=0)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason) == (want.text, want.finish_reason)
    assert got.usage.completion_tokens == len(want.token_ids) and got.model == MODEL
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    told = choice.dspark
    assert told["drafted"] == told["verified"] + told["trimmed"] and told["rounds"] > 0
    assert told["verified"] == told["accepted"] + told["rejected"] == sum(told["verified_at"])
    assert sum(told["accepted_at"]) == told["accepted"]
    assert len(served.openai.completions.create(model=MODEL, prompt="a").choices[0].text) > 0  # 16 tokens unless asked


def test_many_prompts_many_choices_and_seeds(served, direct):
    asked = {"model": MODEL, "prompt": [PROMPT, "class"], "n": 2, "max_tokens": 8, "seed": 7}
    got = served.openai.completions.create(**asked)
    texts = {choice.index: choice.text for choice in got.choices}
    want = [direct(prompt, max_tokens=8, seed=seed).text for prompt in (PROMPT, "class") for seed in (7, 8)]
    assert [texts[index] for index in range(4)] == want and len(set(want)) > 1
    assert got.usage.prompt_tokens < 2 * len(PROMPT + "class")  # each prompt once
    plain = asked | {"extra_body": {"dspark": {"speculation": "off", "acceptance": "coupled", "priority": 2}}}
    again = served.openai.completions.create(**plain)
    assert [choice.text for choice in again.choices] == want
    assert all(choice.dspark["drafted"] == 0 for choice in again.choices)


def test_token_prompts_and_echo(served):
    tokens = served.http.post("/tokenize", json={"prompt": PROMPT}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 512
    text = served.openai.completions.create(**GREEDY, max_tokens=6).choices[0].text
    by_ids = {"model": MODEL, "prompt": tokens["tokens"], "temperature": 0, "max_tokens": 6}
    assert served.openai.completions.create(**by_ids, echo=True).choices[0].text == PROMPT + text
    stream = served.openai.completions.create(**GREEDY, max_tokens=6, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == PROMPT + text
    assert served.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}


def test_streams_say_the_same_in_pieces(served):
    asked = GREEDY | {"max_tokens": 40, "logprobs": 2, "n": 2}
    whole = served.openai.completions.create(**asked)
    chunks = list(served.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 80
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1].dspark["rounds"] > 0
        said = [piece.logprobs for piece in mine]
        assert [token for one in said for token in one.tokens] == choice.logprobs.tokens
        assert [offset for one in said for offset in one.text_offset] == choice.logprobs.text_offset
    assert len(chunks) > 3


def test_traces_come_with_every_piece_if_asked(served):
    asked = GREEDY | {"max_tokens": 40, "extra_body": {"dspark": {"trace": True}}}
    whole = served.openai.completions.create(**asked).choices[0]
    told = whole.dspark["tokens"]
    assert "".join(one["text"] for one in told) == whole.text and len(told) == 40
    corrected = [one for one in told if one["kind"] == "corrected"]
    assert corrected and all(one["rejected"] and 0 <= one["confidence"] <= 1 and one["slot"] for one in corrected)
    assert all("confidence" not in one for one in told if one["kind"] in ("bonus", "plain"))
    assert 0 < whole.dspark["first_token_seconds"] < whole.dspark["seconds"]
    chunks = [chunk.choices[0] for chunk in served.openai.completions.create(**asked, stream=True)]
    assert all("".join(one["text"] for one in piece.dspark["tokens"]) == piece.text for piece in chunks)
    assert [one for piece in chunks for one in piece.dspark["tokens"]] == told
    chat = {"model": MODEL, "messages": TALK, "max_completion_tokens": 9, "temperature": 0}
    pieces = served.openai.chat.completions.create(**chat, stream=True, extra_body=asked["extra_body"])
    for piece in list(pieces)[1:]:  # the first one opens the turn
        text = "".join(one["text"] for one in piece.choices[0].dspark["tokens"])
        assert (piece.choices[0].delta.content or "") == text
    assert "tokens" not in served.openai.completions.create(**GREEDY).choices[0].dspark


def test_logprobs_are_the_targets(served, direct):
    got = served.openai.completions.create(**GREEDY, max_tokens=9, logprobs=3).choices[0].logprobs
    want = direct(PROMPT, max_tokens=9, temperature=0, logprobs=3).logprobs
    assert got.token_logprobs == pytest.approx([one.logprob for one in want])
    assert [max(top.values()) for top in got.top_logprobs] == pytest.approx(got.token_logprobs)
    asked = {"model": MODEL, "messages": TALK, "max_completion_tokens": 5, "temperature": 0}
    chat = served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert len(chat.logprobs.content) == 5 and all(len(one.top_logprobs) == 2 for one in chat.logprobs.content)
    for one in chat.logprobs.content:
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert one.bytes is None or bytes(one.bytes).decode() == one.token


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echoed_prompts_logprobs_are_the_forwards(served, tiny_pair, max_tokens):
    """As evaluation harnesses ask: several prompts of tokens, `echo`, `logprobs`, and little or nothing more."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.target).eval()
    texts = [PROMPT, "x", "def metrics(one, two, three, four, five, six):" * 3]
    prompts = [served.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    asked = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "echo": True, "logprobs": 2}
    whole = served.openai.completions.create(**asked)
    assert whole.usage.completion_tokens <= 3 * max_tokens and whole.usage.prompt_tokens == sum(map(len, prompts))
    for choice, text, tokens in zip(whole.choices, texts, prompts, strict=True):
        told, count = choice.logprobs, len(tokens)
        with torch.no_grad():
            log_TV = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)
        want = [float(log_TV[at, token]) for at, token in enumerate(tokens[1:])]
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert told.token_logprobs[1:count] == pytest.approx(want, abs=1e-4)
        best = log_TV.max(dim=-1).values.tolist()
        assert [max(top.values()) for top in told.top_logprobs[1:count]] == pytest.approx(best[:-1], abs=1e-4)
        assert (
            choice.text.startswith(text) and "".join(told.tokens[:count]) == text
        )  # what follows may be half a letter
        spans = zip(told.text_offset[:count], told.tokens, strict=False)
        assert told.text_offset[0] == 0 and all(text[at:].startswith(one) for at, one in spans)
        assert 0 <= len(told.tokens) - count <= max_tokens and (len(told.tokens) > count) == (max_tokens > 0)
    pieces = [chunk.choices[0] for chunk in served.openai.completions.create(**asked, stream=True)]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [one for piece in mine for one in getattr(piece.logprobs, name)] == getattr(choice.logprobs, name)


def test_chat_follows_the_template(served, direct):
    asked = {"model": MODEL, "messages": TALK, "max_completion_tokens": 12, "temperature": 0}
    whole = served.openai.chat.completions.create(**asked)
    want = direct("system: Be brief.\nuser: add\nassistant:", max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == want.text and whole.choices[0].message.role == "assistant"
    chunks = list(served.openai.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want.text
    older = asked | {"max_tokens": 3, "messages": [{"role": "developer", "content": "Be brief."}, TALK[1]]}
    del older["max_completion_tokens"]
    assert want.text.startswith(
        served.openai.chat.completions.create(**older).choices[0].message.content.rstrip("\ufffd")
    )


def test_shaping_reaches_the_engine(served, direct):
    free = direct(PROMPT, max_tokens=12, temperature=0)
    banned = str(free.token_ids[0])
    other = served.openai.completions.create(**GREEDY, max_tokens=12, logit_bias={banned: -100})
    assert other.choices[0].text == direct(PROMPT, max_tokens=12, temperature=0, logit_bias={int(banned): -100}).text
    assert other.choices[0].text != free.text
    fields = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.9, "seed": 3}
    got = served.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0.7, **fields)
    assert got.choices[0].text == direct(PROMPT, max_tokens=12, temperature=0.7, **fields).text
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "ignore_eos": True}
    got = served.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, seed=4, extra_body=extra)
    assert got.choices[0].text == direct(PROMPT, max_tokens=12, seed=4, **extra).text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_and_are_not_in_it(served, stream):
    text = served.openai.completions.create(**GREEDY, max_tokens=30).choices[0].text
    stop = text[10:13]
    got = served.openai.completions.create(**GREEDY, max_tokens=30, stop=[stop, "never there"], stream=stream)
    choices = [chunk.choices[0] for chunk in got] if stream else got.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_models_and_operations(served):
    (model,) = served.openai.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 512) and served.openai.models.retrieve(MODEL).id == MODEL
    for path, word in (("/health", "ok"), ("/ready", "ready")):
        answer = served.http.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": word})
    assert served.http.get("/version").json()["version"]
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= set(paths)
    assert "access-control-allow-origin" not in served.http.get("/health", headers={"Origin": "http://x"}).headers


def test_metrics_count_what_happened(served):
    def read():
        lines = served.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    asked = {"model": MODEL, "prompt": "def metrics(one, two, three, four, five, six):" * 2, "temperature": 0}
    for _ in range(2):
        told = served.openai.completions.create(**asked, max_tokens=20).choices[0].dspark
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["dspark_generation_tokens_total"] == 40
    assert grown['dspark_requests_total{endpoint="/v1/completions",status="200"}'] == 2
    assert grown["dspark_time_to_first_token_seconds_count"] == grown["dspark_e2e_request_latency_seconds_count"] == 2
    assert grown['dspark_request_success_total{finished_reason="length"}'] == 2
    assert grown["dspark_prefix_cache_hits_total"] > 0
    for what in ("verified", "accepted", "trimmed", "rejected"):
        assert grown[f"dspark_spec_decode_num_{what}_tokens_total"] == 2 * told[what]
    first = 'dspark_spec_decode_num_verified_tokens_per_pos_total{position="0"}'
    assert grown[first] == 2 * told["verified_at"][0]
    assert after["dspark_num_requests_running"] == after["dspark_kv_cache_usage_perc"] == 0
    assert all(math.isfinite(value) for value in after.values())


BAD = [
    ({"temperature": -1}, "temperature", 400),
    ({"temperature": float("nan")}, "temperature", 400),
    ({"max_tokens": 0}, "max_tokens", 400),
    ({"n": 129}, "n", 400),
    ({"prompt": ""}, "the prompt is empty", 400),
    ({"prompt": []}, "the prompt is empty", 400),
    ({"prompt": [10**9]}, "vocabulary", 400),
    ({"prompt": [2**70]}, "prompt", 400),
    ({"prompt": "x" * 5000}, "at most 300 fit", 400),
    ({"prompt": "x" * 30_000}, "larger than 20000 bytes", 413),
    ({"logit_bias": {"x": 1}}, "not a token id", 400),
    ({"logit_bias": {"299999": 1}}, "vocabulary", 400),
    ({"logit_bias": {"3": 1e300}}, "logit_bias", 400),
    ({"stop": [""]}, "stop", 400),
    ({"max_tokens": 0, "echo": True}, "pass echo and logprobs with it", 400),
    ({"logprobs": 21, "echo": True}, "logprobs", 400),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", 400),
    ({"suffix": "x"}, "suffix is not known or not supported", 400),
    ({"dspark": {"priority": 0}}, "priority", 400),
    ({"dspark": {"acceptance": "typical"}}, "acceptance", 400),
    ({"model": "gpt-9"}, "ask for 'tiny'", 404),
]


@pytest.mark.parametrize(("fields", "words", "status"), BAD, ids=[str(fields)[:40] for fields, _, _ in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_fields_are_openai_errors(served, fields, words, status, stream):
    body = json.dumps(GREEDY | {"max_tokens": 4, "stream": stream} | fields)
    got = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = got.json()["error"]
    assert got.status_code == status and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and "_error" in error["type"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"text"', b"[1]", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 15_000, b"null"]
)
def test_bodies_that_are_no_request(served, body):
    got = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_bodies_that_a_page_may_send_unasked(served, kind):
    """Browsers let pages of any origin send these without asking the server first."""
    body, headers = json.dumps(GREEDY).encode(), {} if kind is None else {"content-type": kind}
    got = served.http.post("/v1/completions", content=body, headers=headers)
    assert got.status_code == 400 and "application/json" in got.json()["error"]["message"]
    given = {"content-type": "Application/vnd.api+json; charset=utf-8"}
    assert served.http.post("/v1/completions", content=body, headers=given).status_code == 200


def test_errors_reach_the_sdk(served):
    with pytest.raises(openai.NotFoundError) as caught:
        served.openai.completions.create(model="gpt-9", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.completions.create(model=MODEL, prompt=[5] * 400)
    assert caught.value.code == "context_length_exceeded"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="chat template does not write tools"):
        served.openai.chat.completions.create(model=MODEL, messages=TALK, tools=tools)
    assert served.http.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert served.http.get("/v1/completions").status_code == 405
