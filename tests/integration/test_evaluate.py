"""`dspark evaluate` from arguments to tables, numbers and figures."""

import json

import pytest

from dspark.cli.main import main


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "sets"
    directory.mkdir()
    (directory / "mt-bench.jsonl").write_text('{"turns": ["def add(", "more"]}\n{"turns": ["class Stack"]}\n')
    (directory / "gsm8k.jsonl").write_text('{"turns": ["import"]}\n{"turns": ["return"]}\n{"turns": ["self"]}\n')
    return directory


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def options(pair, *more):
    return ["--target", pair.target, "--max-tokens", 8, "--batch", 3, "--no-compile", *more]


def sets(data):
    return ["--task", "mt-bench", "--task", "gsm8k", "--data", data]


def test_tables_numbers_and_figures(tiny_pair, data, tmp_path, capsys):
    out = tmp_path / "result"
    drafters = [f"tiny={tiny_pair.drafter}", "ngram"]
    assert evaluate(*drafters, *options(tiny_pair, *sets(data)), "--rounds", 2, "--out", out) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert [one["name"] for one in found["drafters"]] == ["tiny", "ngram"]
    assert found["drafters"][0]["kind"] == "dspark" and found["drafters"][0]["layers"] == 1
    assert found["tasks"]["mt-bench"]["turns"] == 3
    for name in ("plain", "tiny", "ngram"):
        for task in found["tasks"].values():
            way = task["ways"][name]
            assert way["tokens"] > 0 and way["tokens_per_second"] > 0 and len(way["speed_ups"]) == 2
            assert way["turns_left_out"] == 0
    tiny = found["tasks"]["gsm8k"]["ways"]["tiny"]
    assert 1 <= tiny["tau"] <= 6 and 0 <= tiny["acceptance_rate"] <= 1
    assert tiny["tau"] == pytest.approx(1 + tiny["acceptance_rate"] * tiny["verified_per_round"], abs=0.2)  # ends cut
    first = tiny["reliability"]["conditional"][0]
    assert first["samples"] == tiny["reached_at"][0] == sum(one["count"] for one in first["bins"])
    assert found["tasks"]["gsm8k"]["ways"]["plain"]["tau"] is None
    assert found["average"]["plain"]["speed_up"] == 1.0
    text = (out / "evaluation.md").read_text()
    assert "| tiny | mt-bench |" in text and "Brier" in text
    pictures = {path.name for path in out.glob("*.png")}
    assert {"acceptance_by_position.png", "threshold_sweep.png"} <= pictures
    assert all(f"]({name})" in text for name in pictures)
    assert "tiny" in capsys.readouterr().out


def test_every_gamma_is_a_drafter_of_its_own(tiny_pair, data, tmp_path):
    out = tmp_path / "result"
    more = ("--gamma", 2, "--gamma", 5, "--rounds", 1, "--seed", 1, "--out", out)
    assert evaluate(tiny_pair.drafter, *options(tiny_pair, "--task", data / "gsm8k.jsonl", *more)) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert [one["gamma"] for one in found["drafters"]] == [2, 5]
    ways = found["tasks"]["gsm8k"]["ways"].values()
    assert len({way["tokens"] for way in ways}) == 1, "one seed, one text, whatever is drafted"
    assert (out / "by_gamma.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "gsm9k"], "'gsm9k' is not known"),
        (["--task", "nowhere/gsm8k.jsonl"], "nowhere/gsm8k.jsonl"),
        (["plain=x"], "'plain' is empty or taken"),
        (["a=ngram", "a=ngram"], "'a' is empty or taken"),
        (["--gamma", "99"], "exceeds the drafter's 5"),
        (["--planner", "sometimes"], "sometimes"),
        (["--temperature", "-1"], "temperature -1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tiny_pair, tmp_path, capsys, arguments, said):
    out = tmp_path / "result"
    given = [str(tiny_pair.drafter)] if "=" not in arguments[0] else []
    assert evaluate(*given, *options(tiny_pair), "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_a_set_that_does_not_fit(tiny_pair, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"turns": ["x = 1\n" * 600]}) + "\n")
    assert evaluate("ngram", "--target", tiny_pair.target, "--task", path, "--no-compile") == 2
    assert "no turn of long fits" in capsys.readouterr().err
