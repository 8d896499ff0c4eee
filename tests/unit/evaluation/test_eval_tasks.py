"""Sets come from the hub's rows or from files with the same turns, and what is missing is said in one line."""

import json

import pytest

from dspark.common.errors import UserError
from dspark.evaluation import tasks
from dspark.evaluation.tasks import TASKS, Task, load_task, said

ROWS = {
    "gsm8k": {"question": "How many {braces}?", "answer": "4"},
    "math500": {"problem": "Find $x$."},
    "aime25": {"question": "Find $y$."},
    "mbpp": {"prompt": "Write a sum."},
    "humaneval": {"prompt": "def f():\n"},
    "livecodebench": {"question_content": "Sort it.", "starter_code": "class Solution:"},
    "mt-bench": {"prompt": ["Write a poem.", "Shorter."]},
    "alpaca": {"instruction": "Translate.", "input": "Haus"},
    "arena-hard": {"turns": [{"content": "Plan a trip."}]},
}


@pytest.fixture
def hub(monkeypatch):
    """A hub of one row for every data set; returns what it was asked for."""
    import datasets

    calls = []

    def load_dataset(source, config=None, **options):
        calls.append((source, config, options))
        task = next(name for name, t in TASKS.items() if (t.source, t.files) == (source, options["data_files"]))
        return iter([ROWS[task]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", TASKS)
def test_every_set_gives_turns(hub, name):
    found = load_task(name).turns
    assert found and all(isinstance(turn, str) and turn for turns in found for turn in turns)
    assert len(found[0]) == (2 if name == "mt-bench" else 1)
    value = next(iter(ROWS[name].values()))
    first = value if isinstance(value, str) else value[0]
    assert (first if isinstance(first, str) else first["content"]) in found[0][0]
    assert all(options["streaming"] for _, _, options in hub)


def test_the_paper_of_settings_is_asked_for(hub):
    assert len(TASKS) == 9
    assert len(load_task("aime25").turns) == 2  # both papers of the year
    assert load_task("alpaca").turns == [["Translate.\n\nHaus"]]
    assert load_task("gsm8k").turns[0][0].startswith("How many {braces}?\nPlease reason step by step")
    assert ("openai/gsm8k", "main") in [(source, config) for source, config, _ in hub]


def test_only_what_is_needed_is_read(hub):
    assert load_task("aime25", limit=1).turns == [[ROWS["aime25"]["question"] + tasks.REASON]]
    assert len(hub) == 1


def test_rows_come_through_datasets(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(5)))
    monkeypatch.setitem(TASKS, "own", Task("json", said("question"), split="train", files=str(path)))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert load_task("own", limit=2).turns == [["0?"], ["1?"]]


def test_files(tmp_path):
    path = tmp_path / "mt-bench.jsonl"
    path.write_text('{"turns": ["a", "b"]}\n{"prompt": "c"}\n')
    assert load_task("mt-bench", directory=tmp_path).turns == [["a", "b"], ["c"]]
    assert load_task(str(path), limit=1) == tasks.Conversations("mt-bench", [["a", "b"]])


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    import datasets

    def away(*_args, **_options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(UserError, match=r"gsm8k cannot be read from the hub \(no route\).*--data"):
        load_task("gsm8k")
    with pytest.raises(UserError, match=r"'gsm9k' is not known.*gsm8k"):
        load_task("gsm9k")
    with pytest.raises(UserError, match=r"alpaca\.jsonl"):
        load_task("alpaca", directory=tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"turns": ["a", 3]}\n')
    with pytest.raises(UserError, match="line 1"):
        load_task(str(tmp_path / "bad.jsonl"))
