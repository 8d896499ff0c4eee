"""What is trained on, before it is tokens: conversations and raw texts, one Arrow file a split, `about.json` beside.

A directory holds `train.arrow` and, unless nothing was held out, `held_out.arrow`, in Arrow's file format:
`datasets.load_dataset("arrow", data_files="DIR/train.arrow")` reads them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dspark.common.errors import UserError
from dspark.common.extras import require

SPLITS = ("train", "held_out")
ABOUT = "about.json"
FORMAT = "dspark samples 1"
BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 24  # what is held in memory before it is written
Message = dict[str, Any]


@dataclass
class Sample:
    """A conversation (`messages`), or raw text (`text`) with what the target wrote after it (`completion`).

    `endings` says how each answer the target wrote ended: stop, length (it was cut) or tool_calls; empty where the
    answers came with the data.
    """

    id: str
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    text: str | None = None
    completion: str | None = None
    endings: list[str] = field(default_factory=list)

    @property
    def cut(self) -> bool:
        """Whether the last answer was cut by length: the target did not end it."""
        return bool(self.endings) and self.endings[-1] not in ("stop", "tool_calls")

    @property
    def characters(self) -> int:
        """How much text there is."""
        said = (message["content"] for message in self.messages or ())
        return sum(map(len, said)) + len(self.text or "") + len(self.completion or "")


def schema() -> Any:
    """The Arrow columns. What a message has beside role and content is JSON in `rest`."""
    pa = require("pyarrow", "train")
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("rest", pa.string())])
    fields = [("id", pa.string()), ("messages", pa.list_(message)), ("tools", pa.string())]
    return pa.schema([*fields, ("text", pa.string()), ("completion", pa.string()), ("endings", pa.list_(pa.string()))])


def as_row(sample: Sample) -> dict[str, Any]:
    """A sample as the columns' values."""
    messages = sample.messages and [
        {"role": m["role"], "content": m["content"], "rest": as_json({k: m[k] for k in m if k not in MESSAGE})}
        for m in sample.messages
    ]
    return {**vars(sample), "messages": messages, "tools": as_json(sample.tools)}


def from_row(row: dict[str, Any]) -> Sample:
    """The inverse of `as_row`."""
    messages = row["messages"] and [
        {"role": m["role"], "content": m["content"], **json.loads(m["rest"] or "{}")} for m in row["messages"]
    ]
    return Sample(**{**row, "messages": messages, "tools": json.loads(row["tools"] or "null")})


MESSAGE = ("role", "content")


def as_json(value: Any) -> str | None:
    """JSON, or None for what is empty; what JSON lacks, such as dates of Parquet, becomes text."""
    return json.dumps(value, ensure_ascii=False, default=str) if value else None


class SampleWriter:
    """Writes one split, a batch of rows at a time."""

    def __init__(self, path: Path) -> None:
        self.pa = require("pyarrow", "train")
        self.schema = schema()
        self.file = self.pa.ipc.new_file(str(path), self.schema)
        self.rows: list[dict[str, Any]] = []
        self.count = self.characters = 0

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        self.rows.append(as_row(sample))
        self.count += 1
        self.characters += sample.characters
        if len(self.rows) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Hand the rows so far to the file."""
        if self.rows:
            self.file.write_batch(self.pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows, self.characters = [], 0

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        if kind is None:
            self.flush()
        self.file.close()


def read_samples(directory: str | Path, split: str) -> Iterator[Sample]:
    """The samples of a split, in order, memory-mapped. Raises UserError for a missing or damaged file."""
    file = open_split(directory, split)
    for number in range(file.num_record_batches):
        for row in file.get_batch(number).to_pylist():
            yield from_row(row)


def count_samples(directory: str | Path, split: str) -> int:
    """How many samples a split has."""
    file = open_split(directory, split)
    return sum(file.get_batch(number).num_rows for number in range(file.num_record_batches))


def open_split(directory: str | Path, split: str) -> Any:
    """The Arrow file of a split."""
    pa = require("pyarrow", "train")
    path = Path(directory, f"{split}.arrow")
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {path.name}; pass a directory made by `dspark data import`") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); make it again") from error
    if file.schema != schema():
        raise UserError(f"{path} has columns {file.schema.names}; pass a directory made by `dspark data import`")
    return file


def splits_of(directory: str | Path) -> list[str]:
    """The splits a directory has. Raises UserError where it was not made by `dspark data`."""
    if read_about(directory).get("format") != FORMAT:
        raise UserError(f"{directory} holds no conversations or texts; pass a directory made by `dspark data import`")
    return [split for split in SPLITS if Path(directory, f"{split}.arrow").exists()]


def write_about(directory: Path, about: dict[str, Any]) -> None:
    """about.json: what the directory holds, where it came from and what was dropped."""
    (directory / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_about(directory: str | Path) -> dict[str, Any]:
    """What `write_about` wrote. Raises UserError where there is none."""
    path = Path(directory, ABOUT)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{directory} has no {ABOUT} ({error.strerror}); pass a directory made by `dspark data`"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); make the directory again") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} is no mapping; make the directory again")
    return about


def check_replaceable(out: Path) -> None:
    """Raises UserError where writing `out` would replace what `dspark data` did not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise UserError(f"{out} holds files that dspark did not write; pass another --out")
