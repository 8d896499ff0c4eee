"""Every prompt is answered once, whatever fails, and a run killed at any moment goes on where it was."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.training.answers import Answer
from dspark.training.endpoints import Endpoints, checked_url
from dspark.training.ingest import Columns, Division, import_samples
from dspark.training.journal import Journal
from dspark.training.regenerate import Settings, beginning, regenerate
from dspark.training.samples import read_about, read_samples
from dspark.training.sources import Row

PARAMS = SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9, seed=5)


def prompts(directory: Path, rows, **options) -> Path:
    options = {"division": Division(held_out=0), **options}
    import_samples([Row("row", row) for row in rows], directory, **options)
    return directory


def run(source, out, *servers, concurrency=8, params=PARAMS, **options):
    settings = {k: options.pop(k) for k in ("template", "prompt_characters") if k in options}

    async def whole():
        options.setdefault("pause", 0.01)
        async with Endpoints([s.url if hasattr(s, "url") else s for s in servers], **options) as endpoints:
            name = await endpoints.meet()
            return await regenerate(source, out, endpoints, Settings(name, params, **settings), concurrency=concurrency)

    return asyncio.run(whole())


def answers(out, split="train"):
    return {sample.messages[0]["content"]: sample for sample in read_samples(out, split)}


def test_turn_by_turn(tmp_path):
    talk = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "not the target's"},
        {"role": "user", "content": "b"},
    ]
    source = prompts(tmp_path / "in", [{"messages": talk}, {"turns": ["x", "think"]}])
    with FakeOpenAI() as server:
        record = run(source, tmp_path / "out", server, template={"enable_thinking": False}, key="secret")
    first, second = read_samples(tmp_path / "out", "train")
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert first.messages[2]["content"].startswith("a!") and first.messages[4]["content"].startswith("b!")
    assert second.messages[3]["reasoning_content"] == "hm" and second.endings == ["stop", "stop"]
    assert [s.id for s in (first, second)] == [s.id for s in read_samples(source, "train")]
    asked = {body["messages"][-1]["content"]: body for body in server.asked}
    assert asked["b"]["messages"] == first.messages[:4], "the second turn is asked after the target's own first answer"
    assert len({body["seed"] for body in server.asked}) == 4 and all(b["key"] == "Bearer secret" for b in server.asked)
    wanted = {"model": "tiny", "temperature": 0.7, "top_p": 0.9, "max_tokens": 9}
    assert asked["a"] | wanted == asked["a"] and "top_k" not in asked["a"]
    assert asked["a"]["chat_template_kwargs"] == {"enable_thinking": False}
    about = read_about(tmp_path / "out")
    assert about == record and about | wanted | {"seed": 5, "template": {"enable_thinking": False}} == about


def test_answers_that_end_otherwise(tmp_path):
    rows = [{"turns": ["long", "never asked"]}, {"turns": ["call f", "never asked"]}, {"turns": ["ok", "silent"]}]
    source = prompts(tmp_path / "in", [*rows, {"prompt": "silent"}])
    with FakeOpenAI() as server:
        record = run(source, tmp_path / "out", server)
    found = answers(tmp_path / "out")
    assert found["long"].cut and found["long"].endings == ["length"] and len(found["long"].messages) == 2
    assert found["call f"].messages[1]["tool_calls"][0]["function"]["name"] == "f" and not found["call f"].cut
    assert [m["role"] for m in found["ok"].messages] == ["user", "assistant"]
    assert record["endings"] == {"length": 1, "tool_calls": 1, "stop": 1}
    assert record["dropped"] == {"the target answered nothing": 1}


def test_raw_text_is_continued(tmp_path):
    source = prompts(
        tmp_path / "in", [{"text": "one two three"}, {"prompt": "p", "response": "r"}], columns=Columns(raw=True)
    )
    with FakeOpenAI() as server:
        run(source, tmp_path / "out", server, prompt_characters=9)
    first, second = read_samples(tmp_path / "out", "train")
    assert first.text == "one two" and first.completion.startswith("one two!") and first.endings == ["stop"]
    assert second.text == "p" and second.completion.startswith("p!")
    assert {body["path"] for body in server.asked} == {"/v1/completions"}


@pytest.mark.parametrize(
    ("text", "begins"), [("a b", "a b"), ("abcdefgh", "abcde"), ("ab cdefg", "ab"), ("abcde fg", "abcde")]
)
def test_beginnings_end_with_a_word(text, begins):
    assert beginning(text, 5) == begins


def test_faults_are_repeated_elsewhere(tmp_path):
    """Statuses, broken connections and malformed replies: nothing is lost, nothing is asked twice in vain."""
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(60)])
    faults = [500, "drop", "garbage", 429, "half", 503]

    def often(number, body):
        return faults[number // 2 % 6] if number % 2 else None

    def never(number, body):
        return None

    with FakeOpenAI(often) as shaky, FakeOpenAI(never) as good:
        record = run(source, tmp_path / "out", shaky, good, retries=12)
    assert record["samples"] == {"train": 60} and set(answers(tmp_path / "out")) == {f"p{i}" for i in range(60)}
    assert len(shaky.answered) + len(good.answered) == 60 and shaky.answered and good.answered
    seeds = {}
    for body in shaky.asked + good.asked:
        assert seeds.setdefault(body["messages"][0]["content"], body["seed"]) == body["seed"], (
            "a repetition is the same"
        )


def test_servers_share_the_work(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(24)])
    with FakeOpenAI(delay=0.05) as one, FakeOpenAI(delay=0.05) as two, FakeOpenAI(delay=0.05) as three:
        run(source, tmp_path / "out", one, two, three, concurrency=24)
        assert [len(server.asked) for server in (one, two, three)] == [8, 8, 8]


def test_a_server_that_dies_leaves_its_work_to_the_others(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(30)])
    with FakeOpenAI() as good:
        dying = FakeOpenAI()
        dying.fault = lambda number, body: dying.http.server_close() or "drop" if number >= 5 else None
        record = run(source, tmp_path / "out", dying, good)
        dying.http.shutdown()
    assert record["samples"] == {"train": 30} and len(good.answered) >= 25


def test_prompts_the_server_refuses_are_left_out(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(9)])

    def fault(number, body):
        said = body["messages"][0]["content"]
        return 400 if said == "p3" else 500 if said == "p4" else None

    with FakeOpenAI(fault) as server:
        record = run(source, tmp_path / "out", server, retries=3)
    assert set(answers(tmp_path / "out")) == {f"p{i}" for i in (0, 1, 2, 5, 6, 7, 8)}
    assert record["dropped"] == {"refused": 2} and any("fault 400" in reason for reason in record["refusals"])
    assert sum(body["messages"][0]["content"] == "p4" for body in server.asked) == 4


@pytest.mark.parametrize(
    ("fault", "says"), [(500, "3 attempts failed"), (401, "--key-env"), (404, "--model"), (400, "refused")]
)
def test_runs_that_cannot_succeed(tmp_path, fault, says):
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(20)])
    with (
        FakeOpenAI(lambda number, body: fault) as server,
        pytest.raises(UserError, match=f"{says}.*fault {fault}|fault {fault}.*{says}"),
    ):
        run(source, tmp_path / "out", server, retries=2)
    assert not (tmp_path / "out").exists()
    assert fault == 500 or len(server.asked) <= 20, "what is hopeless is not repeated"


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": f"p{i}"} for i in range(40)])
    with FakeOpenAI(lambda number, body: None if number <= 25 else 401) as server:
        with pytest.raises(UserError, match="fault 401"):
            run(source, tmp_path / "out", server, concurrency=4)
        kept = len(server.answered)
        assert 20 <= kept <= 25 and not (tmp_path / "out").exists()
        with pytest.raises(UserError, match=r"out.partial was begun with temperature 0.7, now it is 1.0"):
            run(source, tmp_path / "out", server, params=SamplingParams(max_tokens=9, top_p=0.9, seed=5))
        server.fault = lambda number, body: None
        run(source, tmp_path / "out", server)
        assert len(server.answered) == 40 and len(answers(tmp_path / "out")) == 40
        assert not (tmp_path / "out.partial").exists()
        run(source, tmp_path / "out", server)
        assert len(server.answered) == 40, "a finished run asks nothing"
        with pytest.raises(UserError, match=r"out was begun with max_tokens 9"):
            run(
                source,
                tmp_path / "out",
                server,
                params=SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, seed=5),
            )


def test_killed_at_any_moment(tmp_path):
    """SIGKILL, twice: in the end every sample is there once, and no answer that was kept is asked for again."""
    total = 50
    source = prompts(
        tmp_path / "in", [{"turns": [f"p{i}", "more"]} for i in range(total)], division=Division(held_out=0.2)
    )
    out = tmp_path / "out"
    program = f"import sys; sys.path[:0] = {sys.path!r}; from dspark.cli.main import run; run()"
    with FakeOpenAI(delay=0.02) as server:
        command = [
            sys.executable,
            "-c",
            program,
            "data",
            "regenerate",
            str(source),
            "--out",
            str(out),
            "--url",
            server.url,
        ]
        kills, kept = 0, 0
        while kills < 2:
            process = subprocess.Popen(
                [*command, "--concurrency", "4"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            wanted = len(server.answered) + 24 + 7 * kills
            while len(server.answered) < wanted and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, process.stderr.read().decode()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            lines = (tmp_path / "out.partial" / "answers.jsonl").read_bytes().splitlines()
            assert len(lines) > kept and not out.exists()
            kept = len(lines)
        server.delay = 0.0
        done = subprocess.run([*command, "--concurrency", "16"], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
    found = [sample for split in ("train", "held_out") for sample in read_samples(out, split)]
    wanted = [sample for split in ("train", "held_out") for sample in read_samples(source, split)]
    assert [sample.id for sample in found] == [sample.id for sample in wanted] and len(found) == total
    assert all(sample.endings == ["stop", "stop"] for sample in found)
    # What is asked again is only what was under way: at most 4 samples of 2 turns for each kill.
    assert 2 * total <= len(server.answered) <= 2 * total + 8 * kills


def test_a_line_cut_by_a_kill_is_written_again(tmp_path):
    with Journal(tmp_path / "j", {"a": 1}) as journal:
        journal.add("00", {"x": 1})
        journal.add("01", {"x": "é"})
        with pytest.raises(UserError, match="another process"):
            Journal(tmp_path / "j", {"a": 1})
    path = tmp_path / "j" / "answers.jsonl"
    whole = path.read_bytes()
    for kept in range(len(whole) - 1, len(whole) // 2 - 1, -1):
        path.write_bytes(whole[:kept])
        with Journal(tmp_path / "j", {"a": 1}) as journal:
            assert "00" in journal and "01" not in journal and journal.get("01") is None
            journal.add("01", {"x": "é"})
            assert journal.get("01") == {"id": "01", "x": "é"} and len(journal) == 2
        assert path.read_bytes() == whole
    with pytest.raises(UserError, match="begun with a 1, now it is 2"):
        Journal(tmp_path / "j", {"a": 2})


def test_servers_that_do_not_fit(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": "p"}])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"{closed}/v1 does not answer .*dspark serve"):
        run(source, tmp_path / "out", closed)
    with FakeOpenAI(models=["a", "b"]) as two, pytest.raises(UserError, match=r"several models.*--model"):
        run(source, tmp_path / "out", two)
    with FakeOpenAI() as one, FakeOpenAI(models=["b"]) as other, pytest.raises(UserError, match="not 'tiny'"):
        run(source, tmp_path / "out", one, other)
    for url in ("localhost:8000", "ftp://a", ""):
        with pytest.raises(UserError, match="no URL of a server"):
            checked_url(url)
    assert checked_url("http://a:1/") == "http://a:1/v1" and checked_url("http://a/api/v2/") == "http://a/api/v2"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_out_and_source(tmp_path):
    source = prompts(tmp_path / "in", [{"prompt": "p"}])

    class Echo:
        async def chat(self, question, params):
            return Answer({"role": "assistant", "content": "x"}, "stop", 1)

    def call(source, out):
        return asyncio.run(regenerate(source, out, Echo(), Settings("m", PARAMS), concurrency=2))

    with pytest.raises(UserError, match="where the prompts are"):
        call(source, source)
    with pytest.raises(UserError, match=r"has no about.json"):
        call(tmp_path / "away", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="did not write"):
        call(source, tmp_path / "full")
    with pytest.raises(UserError, match="prompt_characters 0"):
        Settings("m", PARAMS, prompt_characters=0)
    assert call(source, tmp_path / "out")["samples"] == {"train": 1}
    assert json.loads((tmp_path / "out" / "about.json").read_text())["identity"]["model"] == "m"
    assert os.listdir(tmp_path / "full") == ["file"]
