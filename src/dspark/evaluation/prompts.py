"""Reads prompt files: JSON Lines of {"turns": [...]} or {"prompt": "..."}."""

from __future__ import annotations

import json
from pathlib import Path

from dspark.common.errors import UserError

Turns = list[str]
"""What a user says in one conversation, first to last."""


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The first prompt of every line. Raises UserError naming the line that has none."""
    return [turns[0] for turns in read_turns(path, limit)]


def read_turns(path: Path, limit: int | None = None) -> list[Turns]:
    """All turns of every line. Raises UserError naming the line that has none."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; pass a JSON Lines file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte offset {error.start}); convert it to UTF-8") from error
    conversations = [_turns(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise UserError(f'{path} holds no prompts; give it lines like {{"prompt": "..."}}')
    return conversations[:limit]


def _turns(path: Path, number: int, line: str) -> Turns:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not JSON ({error.msg}); mend or remove it") from error
    found = (row.get("turns") or row.get("prompt")) if isinstance(row, dict) else None
    turns = [found] if isinstance(found, str) else found
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f'{path} line {number} has neither "turns" nor "prompt" with text; add one')
    return turns
