"""What several commands do with the files and texts a person names."""

from __future__ import annotations

from pathlib import Path

from dspark.common.errors import UserError


def prompt_text(prompt: str | None, file: Path | None) -> str | None:
    """The prompt from --prompt or --file; None if neither was given. Raises UserError for an empty one."""
    if prompt is not None and file is not None:
        raise UserError("--prompt and --file are both given; pass one of them")
    text = read_text(file) if file is not None else prompt
    if text == "":
        where = f"{file} is empty" if file is not None else "the prompt is empty"
        raise UserError(f"{where}; pass at least one character")
    return text


def read_text(path: Path) -> str:
    """A UTF-8 file as text."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; pass a text file") from error


def check_output(path: Path | None) -> None:
    """Raises UserError, before any work is done, where an output file could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory; pass the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"the directory {path.parent} does not exist; make it, or write elsewhere")
