"""`dspark bench serve` against a scripted server that notes its own times, and against ours."""

import asyncio
import json
import time

import pytest
from serving import serving, tiny_core

from dspark.cli.main import main
from dspark.evaluation.client import Client, Question
from dspark.evaluation.serving import offer
from dspark.server.service import ServerConfig

GAP = 0.03  # s between two events of the scripted server


class Scripted:
    """Answers every request with three events `gap` apart, or as its prompt says; keeps the times it did."""

    def __init__(self, gap=GAP):
        self.gap = gap
        self.arrived, self.sent, self.bodies, self.inside, self.most = [], [], [], 0, 0

    async def answer(self, reader, writer):
        while (line := await reader.readline()).strip():
            length = 0
            while (header := (await reader.readline()).strip().lower()) != b"":
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            body = await reader.readexactly(length)
            self.inside += 1
            self.most = max(self.most, self.inside)
            try:
                if not await self.reply(line, body, writer):
                    break
            finally:
                self.inside -= 1
        writer.close()

    async def reply(self, line, body, writer):
        if not line.startswith(b"POST"):
            known = json.dumps({"data": [{"id": "scripted"}]}).encode() if b"/v1/models" in line else b"# no metrics"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(known), known))
            return True
        asked = json.loads(body)
        self.arrived.append(time.perf_counter())
        self.bodies.append(asked)
        if asked["prompt"] == "refuse":
            said = b'{"error": {"message": "too busy"}}'
            writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))
            return True
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = []
        for number in range(3):
            await asyncio.sleep(self.gap)
            if asked["prompt"] == "break" and number == 2:
                return False
            sent.append(time.perf_counter())
            event = {"choices": [{"text": "ab", "finish_reason": "length" if number == 2 else None}]}
            whole = b"data: " + json.dumps(event).encode() + b"\n\n"
            for part in (whole[:9], whole[9:]):  # an event may come in pieces
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
        usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 6}}
        last = b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
        self.sent.append(sent)
        return True


def load(questions, *, gap=GAP, **options):
    """What the scripted server saw and what the client says of it."""

    async def run():
        scripted = Scripted(gap)
        server = await asyncio.start_server(scripted.answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"http://127.0.0.1:{port}") as client:
            await client.meet(None)
            return scripted, await offer(client, questions, **options)

    return asyncio.run(run())


def test_times_are_those_the_server_kept():
    scripted, offered = load([Question("a", 6)], gap=5 * GAP)
    (answer,), (sent,), (arrived,) = offered.answers, scripted.sent, scripted.arrived
    assert answer.error is None and (answer.text, answer.output_tokens, answer.prompt_tokens) == ("ababab", 6, 4)
    assert len(answer.came) == 3 and answer.start <= arrived
    for came, left, after in zip(answer.came, sent, [*sent[1:], answer.start + offered.duration], strict=True):
        assert left <= came <= after  # no event is taken for a later one
    assert answer.ttft >= 5 * GAP and answer.tpot == pytest.approx((answer.came[2] - answer.came[0]) / 5)
    body = scripted.bodies[0]
    assert body["model"] == "scripted" and body["max_tokens"] == 6 and body["stream_options"] == {"include_usage": True}


def test_requests_leave_when_due_and_no_more_at_once_than_allowed():
    dues = [0.0, 0.05, 0.1, 0.15]
    _, offered = load([Question("a", 6, due) for due in dues])
    began = offered.answers[0].start
    assert all(a.start - began >= due - 0.005 for a, due in zip(offered.answers, dues, strict=True))
    narrow, offered = load([Question("a", 6)] * 6, most=2)
    assert narrow.most == 2 and offered.duration >= 3 * 3 * GAP
    wide, _ = load([Question("a", 6)] * 6, warmups=3)
    assert wide.most > 2 and len(wide.arrived) == 9


def test_what_goes_wrong_is_counted_and_hurts_nobody_else():
    _, offered = load([Question(prompt, 6) for prompt in ("a", "refuse", "break", "b")])
    ok, refused, broken, also = offered.answers
    assert ok.error is None and also.error is None
    assert refused.error == "503: too busy" and broken.error is not None and not refused.came


def test_our_own_server(tiny_pair, tmp_path, capsys):
    out = tmp_path / "speed.json"
    with serving(tiny_core(tiny_pair), ServerConfig(name="tiny")) as running:
        chat = ["bench", "serve", "--url", running.url, "--chat", "--num-prompts", "5", "--max-tokens", "3:6"]
        assert main([*chat, "--prompt-words", "2:4", "--ignore-eos", "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        assert found["completed"] == 5 and found["failed"] == 0 and found["model_id"] == "tiny"
        assert all(3 <= length <= 6 for length in found["output_lens"])
        assert found["total_output_tokens"] == sum(found["output_lens"]) and found["request_rate"] == "inf"
        assert found["spec_decode_num_drafts"] > 0 and found["spec_decode_acceptance_length"] >= 1
        trace = tmp_path / "trace.csv"
        trace.write_text("time,prompt_tokens,new_tokens\n0.0,2,3\n0.1,2,4\n")
        figures = tmp_path / "figures"
        replay = ["bench", "serve", "--url", running.url, "--trace", str(trace), "--figures", str(figures)]
        assert main([*replay, "--goodput", "ttft:100000", "--ignore-eos", "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        assert found["output_lens"] == [3, 4] and found["request_goodput"] == found["request_throughput"]
        assert (figures / "latency.png").is_file()
        assert "2, 0" in capsys.readouterr().out
        assert main(["bench", "serve", "--url", running.url, "--num-prompts", "2", "--extra-body", '{"top_p": 7}']) == 1
        assert "failed: 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--url", "nowhere"], "no URL"),
        (["--request-rate", "0"], "request rate 0.0"),
        (["--request-rate", "2", "--burstiness", "0"], "burstiness 0.0"),
        (["--goodput", "speed:3"], "'speed:3' is no limit"),
        (["--extra-body", "[]"], "no JSON object"),
        (["--percentiles", "50,101"], "past 100"),
        (["--max-tokens", "9:3"], "no range"),
    ],
)
def test_bad_input_is_one_line(options, says, capsys):
    assert main(["bench", "serve", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
