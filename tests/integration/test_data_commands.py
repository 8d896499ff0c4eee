"""`dspark data`, from a file of conversations to tokens a drafter can be trained on."""

import json
import re
import shutil

import pytest
from fake_openai import FakeOpenAI
from transformers import AutoTokenizer

from dspark.cli.main import main
from dspark.training.data import Documents
from dspark.training.samples import read_samples

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_target(tiny_pair, tmp_path_factory):
    """The tiny target with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(tiny_pair.target, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(capsys):
    def call(*arguments) -> str:
        capsys.readouterr()
        assert main(["data", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys):
    def call(*arguments) -> str:
        capsys.readouterr()
        assert main(["data", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    return call


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = [{"prompt": f"what is {i}?", "response": f"it is {i}, one more than {i - 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    return path


def test_import_tokenize_stats(run, conversations, chat_target, tmp_path):
    out = run("import", conversations, "--out", tmp_path / "samples", "--held-out", 0.2)
    assert "dropped 1: said the same as an earlier row" in out
    out = run("tokenize", tmp_path / "samples", "--target", chat_target, "--out", tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(chat_target)
    total = 0
    for split in ("train", "held_out"):
        data = Documents(tmp_path / "tokens" / split, 512)
        total += len(data.offsets) - 1
        for start, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
            tokens, written = data.tokens[start:end], data.mask[start:end] > 0
            asked, said = tokenizer.decode(tokens[~written]), tokenizer.decode(tokens[written])
            n = asked.removeprefix("user: what is ").partition("?")[0]
            assert said == f"it is {n}, one more than {int(n) - 1}<|endoftext|>"
    assert total == 40
    out = run("stats", tmp_path / "tokens", "--json", tmp_path / "stats.json")
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["train"]["documents"] + found["held_out"]["documents"] == 40
    assert found["train"]["tokens"] == len(Documents(tmp_path / "tokens" / "train", 512).tokens)
    assert 0.3 < found["train"]["supervised_share"] < 0.9 and f"{found['train']['tokens']:,}" in out
    assert "supervised" in run("stats", tmp_path / "tokens" / "train")
    assert "user turns" in run("stats", tmp_path / "samples")


def test_regenerate_through_servers(run, conversations, chat_target, tmp_path):
    samples, answers = tmp_path / "samples", tmp_path / "answers"
    run("import", conversations, "--out", samples, "--held-out", 0.2)
    with FakeOpenAI(lambda number, body: 500 if number == 3 else None) as one, FakeOpenAI() as other:
        urls = ["--url", one.url, "--url", f"{other.url}/v1/"]
        out = run("regenerate", samples, "--out", answers, *urls, "--temperature", 0.5, "--template", "think=false")
        asked = one.asked + other.asked
        assert "40 answers" in out and one.asked and other.asked and len(asked) == 41
        assert all(body["temperature"] == 0.5 and body["chat_template_kwargs"] == {"think": False} for body in asked)
        assert (
            run("regenerate", samples, "--out", answers, *urls, "--temperature", 0.5, "--template", "think=false")
            == out
        )
        assert len(one.asked + other.asked) == 41
    assert "endings: stop" in run("stats", answers)
    run("tokenize", answers, "--target", chat_target, "--out", tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens" / "about.json").read_text())["template"] == {"think": False}
    data = Documents(tmp_path / "tokens" / "train", 512)
    said = AutoTokenizer.from_pretrained(chat_target).decode(
        data.tokens[: data.offsets[1]][data.mask[: data.offsets[1]] > 0]
    )
    assert re.fullmatch(r"what is \d+\?!\d+<\|endoftext\|>", said)


def test_regenerate_in_this_process(run, conversations, chat_target, tiny_pair, tmp_path):
    """The seeds make the texts: the same with any drafter and any number of requests at once."""
    samples = tmp_path / "samples"
    run("import", conversations, "--out", samples, "--held-out", 0, "--limit", 6)
    texts = []
    for drafter, concurrency in ((tiny_pair.drafter, 4), ("none", 1)):
        out = tmp_path / f"answers{concurrency}"
        options = ["--drafter", drafter, "--max-tokens", 12, "--concurrency", concurrency, "--seed", 3]
        run("regenerate", samples, "--out", out, "--target", chat_target, *options)
        texts.append([sample.messages[1:] + sample.endings for sample in read_samples(out, "train")])
    assert texts[0] == texts[1] and len(texts[0]) == 6
    assert len({str(text) for text in texts[0]}) == 6, "every prompt has its own seed"
    run("tokenize", out, "--target", chat_target, "--out", tmp_path / "tokens")
    conversations.write_text('{"text": "def add(a, b):"}\n')
    run("import", conversations, "--out", samples, "--held-out", 0)
    run("regenerate", samples, "--out", tmp_path / "raw", "--target", tiny_pair.target, "--max-tokens", 12)
    [sample] = read_samples(tmp_path / "raw", "train")
    assert sample.text == "def add(a, b):" and sample.completion


def test_regenerate_refuses(run, refused, conversations, tiny_pair, tmp_path):
    samples, out = tmp_path / "samples", tmp_path / "answers"
    run("import", conversations, "--out", samples, "--held-out", 0)
    assert "--url" in refused("regenerate", samples, "--out", out)
    assert "not both" in refused("regenerate", samples, "--out", out, "--url", "http://a", "--target", "b")
    assert "no URL" in refused("regenerate", samples, "--out", out, "--url", "localhost:1")
    assert "does not answer" in refused("regenerate", samples, "--out", out, "--url", "http://127.0.0.1:9")
    assert "temperature -1" in refused("regenerate", samples, "--out", out, "--url", "http://a", "--temperature", -1)
    with FakeOpenAI() as server:
        assert "--model" in refused("regenerate", samples, "--out", out, "--url", server.url, "--model", "other")
        assert "about.json" in refused("regenerate", tmp_path, "--out", out, "--url", server.url)
    assert "no chat template" in refused("regenerate", samples, "--out", out, "--target", tiny_pair.target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "talk.jsonl"]


def test_estimate_and_train(run, conversations, chat_target, tmp_path):
    run("import", conversations, "--out", tmp_path / "samples", "--held-out", 0.2)
    run("tokenize", tmp_path / "samples", "--target", chat_target, "--out", tmp_path / "tokens")
    options = ["--target", chat_target, "--length", 64, "--taps", 2, "--epochs", 3]
    out = run("estimate", tmp_path / "tokens", *options, "--json", tmp_path / "estimate.json")
    found = json.loads((tmp_path / "estimate.json").read_text())
    sizes = {mode["mode"]: mode["bytes"] for mode in found["modes"]}
    assert sizes["online"] == 0 and sizes["cached bf16"] == sizes["hybrid bf16"] and found["rates"]["tokens"] > 0
    counts = found["counts"]
    assert sizes["cached bf16"] == 2 * 32 * (2 * counts["tokens"] + counts["supervised"])
    assert all(name in out for name in sizes) and f"{counts['tokens']:,} tokens" in out
    given = run("estimate", tmp_path / "tokens" / "train", *options, "--tokens-per-second", 7, "--budget-gb", 1e-4)
    assert "7 tokens/s" in given and "kept)" in given
    recipe = tmp_path / "recipe.yaml"
    drafter = {"layers": 1, "block_size": 3, "taps": [0, 2], "mask_token_id": 1, "markov_rank": 4}
    small = {"steps": 2, "batch": 2, "micro_batch": 1, "length": 48, "anchors": 4, "evaluate_sequences": 2}
    paths = {"train": str(tmp_path / "tokens" / "train"), "held_out": str(tmp_path / "tokens" / "held_out")}
    recipe.write_text(json.dumps({"target": str(chat_target), **paths, "drafter": drafter, **small}))
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_estimate_refuses(run, refused, conversations, chat_target, tmp_path):
    run("import", conversations, "--out", tmp_path / "samples", "--held-out", 0)
    assert "tokens.npy" in refused("estimate", tmp_path / "samples", "--target", chat_target)
    run("tokenize", tmp_path / "samples", "--target", chat_target, "--out", tmp_path / "tokens")
    assert "a/b/c" in refused("estimate", tmp_path / "tokens", "--target", "a/b/c")
    options = ["--target", chat_target, "--tokens-per-second", 5]
    assert "0.0 disk" in refused("estimate", tmp_path / "tokens", *options, "--disk-gb-per-second", 0)
    assert "taps" in refused("estimate", tmp_path / "tokens", *options, "--taps", -1)


def test_import_refuses(refused, conversations, tmp_path):
    out = tmp_path / "samples"
    assert "--column" in refused("import", conversations, "--out", out, "--column", "query")
    assert "away.jsonl" in refused("import", tmp_path / "away.jsonl", "--out", out)
    assert "held_out 2" in refused("import", conversations, "--out", out, "--held-out", 2)
    assert "did not write" in refused("import", conversations, "--out", tmp_path)
    assert sorted(tmp_path.iterdir()) == [conversations]


def test_tokenize_refuses(run, refused, conversations, chat_target, tiny_pair, tmp_path):
    samples, out = tmp_path / "samples", tmp_path / "tokens"
    assert "about.json" in refused("tokenize", samples, "--target", chat_target, "--out", out)
    run("import", conversations, "--out", samples, "--held-out", 0)
    assert "no chat template" in refused("tokenize", samples, "--target", tiny_pair.target, "--out", out)
    assert "KEY=VALUE" in refused("tokenize", samples, "--target", chat_target, "--out", out, "--template", "thinking")
    assert "config.json" in refused("tokenize", samples, "--target", tmp_path, "--out", out)
    conversations.write_text('{"prompt": "never answered"}\n')
    run("import", conversations, "--out", samples, "--held-out", 0)
    assert "regenerate" in refused("tokenize", samples, "--target", chat_target, "--out", out)
    assert not out.exists() and sorted(tmp_path.iterdir()) == sorted([samples, conversations])


def test_stats_refuses(run, refused, conversations, chat_target, tmp_path):
    assert "about.json" in refused("stats", tmp_path / "away")
    run("import", conversations, "--out", tmp_path / "samples", "--held-out", 0)
    assert "directory" in refused("stats", tmp_path / "samples", "--json", tmp_path)
    run("tokenize", tmp_path / "samples", "--target", chat_target, "--out", tmp_path / "tokens")
    path = tmp_path / "tokens" / "train" / "mask.npy"
    path.write_bytes(path.read_bytes()[:-5])
    assert "mask.npy is truncated" in refused("stats", tmp_path / "tokens")
