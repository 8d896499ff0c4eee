"""What a run tells reaches the log, the terminal, TensorBoard and Weights & Biases, and only from the first rank."""

import io
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dspark.common.errors import UserError
from dspark.training.report import Bar, TensorBoard, duration, reporting, scalars
from dspark.training.sharding import Ranks

TRAIN = {"step": 3, "loss": 1.5, "tau": 2.25, "acceptance": [0.5, 0.25], "tokens_per_s": 900}
HELD_OUT = {"step": 4, "evaluation": True, "loss": 1.25, "tau": 2.5, "acceptance": [0.75, 0.5]}


def shown(*, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    bar = Bar(2, 10, console)
    bar.advance(3)
    bar.line(TRAIN)
    bar.line(HELD_OUT)
    bar.close()
    return console.file.getvalue()


def test_without_a_terminal_there_are_plain_lines():
    first, second = shown(terminal=False).splitlines()
    assert first.startswith("step 3/10  loss 1.500  τ 2.25  900 tokens/s  0 s left")
    assert second == "step 4  held out: loss 1.250  τ 2.50  acceptance [0.75, 0.5]"


def test_on_a_terminal_there_is_a_bar_with_the_same():
    text = shown(terminal=True)
    assert "3/10" in text and "loss 1.500  τ 2.25  900 tokens/s" in text and "held out" in text


def test_time_left_as_people_say_it():
    assert [duration(x) for x in (4, 600, 7200)] == ["4 s", "10 min", "2.0 h"]


def test_numbers_by_name():
    assert scalars(TRAIN) == {
        "train/loss": 1.5,
        "train/tau": 2.25,
        "train/acceptance/1": 0.5,
        "train/acceptance/2": 0.25,
        "train/tokens_per_s": 900.0,
    }
    assert scalars(HELD_OUT)["held_out/acceptance/2"] == 0.5


def test_tensorboard_reads_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with ExitStack() as stack:
        TensorBoard(tmp_path, 2, stack).line(TRAIN)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/tau")] == [(3, 2.25)]


def test_weights_and_biases_goes_on_with_its_run(recipe, tmp_path, monkeypatch):
    seen = []

    class Run:
        id = "abc"

        def log(self, values, step):
            seen.append((step, values["train/tau"]))

        def finish(self):
            seen.append("finished")

    def init(**options):
        seen.append((options["project"], options["id"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = replace(recipe, wandb="drafters")
    for _ in range(2):
        with reporting(config, tmp_path, Ranks.alone("cpu"), begin=0, steps=10) as report:
            report.line(3, {k: v for k, v in TRAIN.items() if k != "step"})
    assert seen == [("drafters", None), (3, 2.25), "finished", ("drafters", "abc"), (3, 2.25), "finished"]


def test_a_missing_library_is_one_line(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(UserError, match=r"needs wandb, which is not installed; pip install 'dspark\[wandb\]'"),
        reporting(replace(recipe, wandb="x"), tmp_path, Ranks.alone("cpu"), begin=0, steps=1),
    ):
        pass


def test_other_ranks_are_silent(recipe, tmp_path, capsys):
    for rank in (0, 1):
        with reporting(recipe, tmp_path, Ranks(torch.device("cpu"), rank, 2), begin=0, steps=10) as report:
            report.line(3, {k: v for k, v in TRAIN.items() if k != "step"})
            report.advance(3)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["tau"] == 2.25
    assert len(capsys.readouterr().out.splitlines()) == 1
