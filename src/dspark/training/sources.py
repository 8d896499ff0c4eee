"""Rows of data sets as they come: JSON Lines, Parquet, plain text files, and what the `datasets` library reads."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from dspark.common.errors import UserError
from dspark.common.extras import require

JSON_LINES, PARQUET, TEXT = (".jsonl", ".json", ".ndjson"), (".parquet",), (".txt", ".md", ".rst", ".py")


class Row(NamedTuple):
    """One row, or what is wrong with it."""

    where: str
    fields: dict[str, Any] | None
    problem: str = ""


def read_rows(source: str, *, split: str = "train", config: str | None = None) -> Iterator[Row]:
    """The rows of a file, of a directory or of a data set on the Hub, streamed.

    `split` and `config` choose within what `datasets` loads. Raises UserError for what cannot be read at all.
    """
    path = Path(source)
    saved = (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()
    if path.exists() and not saved:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and kind(file))
        if files:
            return chain.from_iterable(map(read_file, files))
    if not path.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~")) or kind(path)):
        raise UserError(f"{source} does not exist; pass a file, a directory or a Hub data set owner/name")
    return read_with_datasets(source, split, config)


def kind(path: Path) -> str:
    """The suffix that says how a file is read, "" for an unknown one."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (*JSON_LINES, *PARQUET, *TEXT) else ""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, by its suffix."""
    suffix = kind(path)
    if not suffix:
        known = " ".join((*JSON_LINES, *PARQUET, *TEXT))
        raise UserError(f"{path} has a suffix that says nothing about its format; rename it to one of {known}")
    try:
        if suffix in PARQUET:
            yield from read_parquet(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from (read_text if suffix in TEXT else read_json_lines)(path, cast(BinaryIO, file))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; pass another file") from error


def read_json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    """One object a line; a file that is one JSON array of objects works too, and is read whole."""
    for number, line in enumerate(file, 1):
        where = f"{path} line {number}"
        if number == 1 and line.lstrip().startswith(b"["):
            yield from read_json_array(path, line + file.read())
            return
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield Row(where, None, f"is not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1})")
        except ValueError as error:
            yield Row(where, None, f"is not JSON ({error})")
        else:
            yield as_row(where, value)


def read_json_array(path: Path, content: bytes) -> Iterator[Row]:
    """The objects of a JSON array."""
    try:
        values = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is neither JSON Lines nor a JSON array ({error}); mend it") from error
    for number, value in enumerate(values, 1):
        yield as_row(f"{path} entry {number}", value)


def as_row(where: str, value: Any) -> Row:
    """A row from a JSON value."""
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, None, f"is no JSON object ({value!r:.40})")


def read_text(path: Path, file: BinaryIO) -> Iterator[Row]:
    """A plain file is one text."""
    try:
        yield Row(str(path), {"text": file.read().decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        at = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        yield Row(str(path), None, f"is not UTF-8 ({at})")


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, a batch at a time."""
    pa, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", fields)
    except pa.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file ({first_line(error)}); copy it again") from error


def read_with_datasets(source: str, split: str, config: str | None) -> Iterator[Row]:
    """What `datasets` makes of a directory or a Hub id, streamed; a directory saved by `save_to_disk` too."""
    datasets = require("datasets", "train")
    datasets.utils.logging.set_verbosity_error()
    try:
        if Path(source, "dataset_dict.json").exists():
            rows = datasets.load_from_disk(source)[split]
        elif Path(source, "dataset_info.json").exists():
            rows = datasets.load_from_disk(source)
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source} row {number}", fields)
    except UserError:
        raise
    except Exception as error:  # the library passes on whatever its readers and the network raise
        raise UserError(
            f"`datasets` cannot load split {split!r} of {source} ({type(error).__name__}: {first_line(error)}); "
            "check the name, --split and --config, or pass a file"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without its story."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
