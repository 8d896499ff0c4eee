"""The commands, from arguments to what a person or a script gets."""

import json
import re

import pytest

from dspark.cli.main import main

LAST_LINE = r"speed-up \d+\.\dx, same text: yes"


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr()

    return call


def test_version(run):
    assert re.fullmatch(r"dspark \d+\.\d+\.\d+\n", run("--version")[0])


@pytest.mark.parametrize("temperature", [0, 1])
def test_demo(run, tiny_pair, tmp_path, temperature):
    html = tmp_path / "demo.html"
    pair = ["--target", tiny_pair.target, "--drafter", tiny_pair.drafter]
    options = ["--no-compile", "--max-tokens", 20, "--rounds", 1, "--temperature", temperature, "--html", html]
    out, _ = run("demo", *pair, *options)
    lines = out.splitlines()
    assert re.fullmatch(LAST_LINE, lines[-1])
    assert "80 tokens for 4 prompts" in lines[-2] and f"temperature {temperature}" in lines[-2]
    page = html.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and lines[-2] in page
    assert page.count('class="a"') + page.count('class="t"') == 80 + 2  # all tokens, and the legend's two
    assert "http" not in page, "the page must stand alone"


def test_demo_of_a_file(run, tiny_pair, tmp_path):
    path = tmp_path / "start.py"
    path.write_text("def add(é):\n", encoding="utf-8")
    pair = ["--target", tiny_pair.target, "--drafter", tiny_pair.drafter]
    out, _ = run("demo", *pair, "--file", path, "--max-tokens", 5, "--rounds", 1, "--no-compile")
    assert "def add(é):" in out and "5 tokens for 1 prompt," in out
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])


def test_generate_without_a_target_takes_the_embedded_pair(run):
    out, err = run(
        "generate", "--planner", "full", "--prompt", "def add(a, b):", "--max-tokens", 12, "--temperature", 0
    )
    assert out.strip() and "12 tokens in" in err and "drafts accepted" in err


def test_generate_writes_the_same_text_with_any_drafter(run, tiny_pair, tmp_path):
    texts = set()
    for drafter in ("none", "ngram", tiny_pair.drafter):
        for planner in ("full", "fixed:2", "threshold:0.5"):
            out, err = run(
                "generate", tiny_pair.target, "--drafter", drafter, "--planner", planner,
                "--prompt", "def add(", "--seed", 3, "--max-tokens", 24,
            )  # fmt: skip
            texts.add(out)
            assert "24 tokens in" in err and err.count("\n") == 1
    assert len(texts) == 1
    output = tmp_path / "text"
    out, _ = run(
        "generate", tiny_pair.target, "--prompt", "def add(", "--seed", 3, "--max-tokens", 24, "--output", output
    )
    assert out == "" and output.read_text(encoding="utf-8") + "\n" in texts


def test_generate_from_a_file_until_a_stop_string(run, tiny_pair, tmp_path):
    path = tmp_path / "start.py"
    path.write_text("def add(a, b):\n", encoding="utf-8")
    whole, _ = run("generate", tiny_pair.target, "--file", path, "--temperature", 0, "--max-tokens", 30)
    stop = whole[10:12]
    out, err = run("generate", tiny_pair.target, "--file", path, "--temperature", 0, "--stop", stop)
    assert out == whole[: whole.index(stop)] + "\n" and "ended by stop" in err


@pytest.mark.parametrize("batch", [1, 3])
def test_bench_decode(run, tiny_pair, tmp_path, batch):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "speed.json"
    prompts.write_text('{"turns": ["def add(", "more"]}\n{"prompt": "class Stack"}\n\n{"prompt": "import"}\n')
    pair = ["--target", tiny_pair.target, "--drafter", tiny_pair.drafter]
    options = ["--prompts", prompts, "--max-tokens", 8, "--rounds", 2, "--batch", batch, "--no-compile"]
    run("bench", "decode", *pair, *options, "--json", output)
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["contenders"]}
    assert {"engine, plain", "engine, DSpark", "transformers, generate"} <= set(rows)
    assert ("transformers, prompt lookup" in rows) == (batch == 1)
    for row in rows.values():
        assert row["tokens"] == 24 and row["tokens_per_second"] > 0 and row["same_texts_as_plain"] == 3
        assert all(len(times) == 2 for times in row["seconds"])
    assert rows["engine, DSpark"]["tau"] >= 1 and found["where"]["torch"]
