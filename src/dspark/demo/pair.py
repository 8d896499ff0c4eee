"""Where the embedded target and its drafter lie in an installation."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from dspark.common.errors import UserError


def demo_target_path() -> Path:
    """The directory of the embedded target: config, weights, tokenizer."""
    return _embedded("target")


def demo_drafter_path() -> Path:
    """The directory of the embedded DSpark drafter."""
    return _embedded("drafter")


def _embedded(name: str) -> Path:
    path = Path(str(files("dspark.demo"))) / name
    if not (path / "config.json").is_file():
        raise UserError(f"this installation has no embedded {name} ({path}); pass --{name} with a directory or hub id")
    return path
