"""The nine benchmark sets by name, from the hub or from local files; any other file of prompts by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.evaluation.prompts import Turns, read_turns

Row = Mapping[str, Any]

REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SOLVE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"


@dataclass(frozen=True)
class Task:
    """Where a set lies on the hub, and what of a row is said to the model."""

    source: str  # a data set's id, or "json" for `files` that are read as they are
    turns: Callable[[Row], Turns]
    configs: tuple[str | None, ...] = (None,)
    split: str = "test"
    files: str | None = None


@dataclass(frozen=True)
class Conversations:
    """One set, loaded."""

    name: str
    turns: list[Turns]


def said(field: str, before: str = "", after: str = "") -> Callable[[Row], Turns]:
    """One turn: a field of the row, with something around it."""
    return lambda row: [f"{before}{row[field]}{after}"]


def instructed(row: Row) -> Turns:
    """Alpaca: an instruction, and sometimes what it is about."""
    return ["\n\n".join(part for part in (row["instruction"], row["input"]) if part)]


def competition(row: Row) -> Turns:
    """LiveCodeBench: a statement, and sometimes the class to complete."""
    start = row.get("starter_code")
    ending = f"\n\nStart from this:\n```python\n{start}\n```" if start else ""
    return [f"{row['question_content']}\n\nWrite a Python program that solves it.{ending}"]


def asked(row: Row) -> Turns:
    """Arena-Hard: version 0.1 has a list of turns, version 2 a prompt."""
    return [turn["content"] for turn in row["turns"]] if row.get("turns") else [row["prompt"]]


LIVECODEBENCH = "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"
ARENA_HARD = "hf://datasets/lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/question.jsonl"
TASKS: dict[str, Task] = {
    "gsm8k": Task("openai/gsm8k", said("question", after=REASON), ("main",)),
    "math500": Task("HuggingFaceH4/MATH-500", said("problem", after=REASON)),
    "aime25": Task("opencompass/AIME2025", said("question", after=REASON), ("AIME2025-I", "AIME2025-II")),
    "mbpp": Task("google-research-datasets/mbpp", said("prompt"), ("sanitized",)),
    "humaneval": Task("openai/openai_humaneval", said("prompt", SOLVE, "\n```")),
    "livecodebench": Task("json", competition, split="train", files=LIVECODEBENCH),
    "mt-bench": Task("HuggingFaceH4/mt_bench_prompts", lambda row: list(row["prompt"]), split="train"),
    "alpaca": Task("tatsu-lab/alpaca", instructed, split="train"),
    "arena-hard": Task("json", asked, split="train", files=ARENA_HARD),
}


def load_task(name: str, *, directory: Path | None = None, limit: int | None = None) -> Conversations:
    """A set by name, or a file by path. With a `directory` a name is the file NAME.jsonl in it, never the hub.

    Raises UserError for a name nobody knows, and where a set cannot be read.
    """
    if name.endswith(".jsonl"):
        return Conversations(Path(name).stem, read_turns(Path(name), limit))
    if directory is not None:
        return Conversations(name, read_turns(directory / f"{name}.jsonl", limit))
    if name not in TASKS:
        raise UserError(f"task {name!r} is not known; pass a .jsonl file or one of {', '.join(TASKS)}")
    task = TASKS[name]
    return Conversations(name, [task.turns(row) for row in islice(rows(name, task), limit)])


def rows(name: str, task: Task) -> Iterator[Row]:
    """A set's rows from the hub, in their order, no more downloaded than is read."""
    load = require("datasets", "train").load_dataset
    try:
        for config in task.configs:
            yield from load(task.source, config, split=task.split, data_files=task.files, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own and the hub's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task {name} cannot be read from the hub ({reason}); pass --data with a directory that has {name}.jsonl"
        ) from error
