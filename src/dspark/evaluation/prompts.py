"""Reads prompt files: JSON Lines of {"turns": [...]} or {"prompt": "..."}."""

from __future__ import annotations

import json
from pathlib import Path

from dspark.common.errors import UserError


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The first prompt of every line. Raises UserError naming the line that has none."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; pass a JSON Lines file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte offset {error.start}); convert it to UTF-8") from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f'{path} holds no prompts; give it lines like {{"prompt": "..."}}')
    return prompts[:limit]


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number} is not JSON ({error.msg}); mend or remove it") from error
    turns = row.get("turns") if isinstance(row, dict) else None
    text = turns[0] if isinstance(turns, list) and turns else row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f'{path} line {number} has neither "turns" nor "prompt" with text; add one')
    return text
