"""What several commands do with the files and texts a person names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark.common.errors import UserError

Template = Annotated[
    list[str] | None,
    typer.Option("--template", help="KEY=VALUE for the chat template, as in enable_thinking=false; may be repeated."),
]

Planner = Annotated[
    str, typer.Option(help="auto, none, full, fixed:N, threshold:C, greedy, lagged, lookahead or joint.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as the target was saved.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda where there is one.")]


def the_pair(target: str | None, drafter: str | None, *, needed: bool = True) -> tuple[str, str]:
    """Target and drafter: the embedded ones where no target is named, else the drafter inside the target, "auto".

    With `needed`, raises UserError where "auto" would find no drafter.
    """
    from dspark.demo.pair import demo_drafter_path, demo_target_path

    named = None if drafter == "auto" else drafter
    if target is None:
        return str(demo_target_path()), named or str(demo_drafter_path())
    if named or not needed:
        return target, named or "auto"
    inside = Path(target, "drafter")
    if not (inside / "config.json").is_file():
        raise UserError(
            f"no drafter is named and {target} has none inside; pass --drafter DIRECTORY, a hub id or ngram"
        )
    return target, str(inside)


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
    """A UTF-8 file as text; `-` is standard input."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8")
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


def numbers(name: str, text: str, *, whole: bool = False) -> list[float]:
    """Positive numbers with commas between them; none in an empty text. Raises UserError for anything else."""
    try:
        found = [float(int(part) if whole else float(part)) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if not all(0 < number < float("inf") for number in found):
        kind = "whole numbers" if whole else "numbers"
        raise UserError(f"--{name} {text!r} is no list of {kind} above 0; pass for example --{name} 1,2,4")
    return found


def span(name: str, text: str) -> tuple[int, int]:
    """LOW:HIGH, or one number for both. Raises UserError for anything else."""
    low, _, high = text.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal() or not 1 <= int(low) <= int(high or low):
        raise UserError(f"--{name} {text!r} is no range of tokens; pass for example --{name} 32:96")
    return int(low), int(high or low)


def template_options(pairs: list[str] | None) -> dict[str, Any]:
    """Template options from KEY=VALUE; a value that is JSON is that, any other is text."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--template {pair!r} is no KEY=VALUE; write it like enable_thinking=false")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
