"""Answers as they come, one line each, so that a run killed at any moment goes on with none lost and none doubled."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dspark.common.errors import UserError
from dspark.common.files import replacing_file

SETTINGS, LINES = "settings.json", "answers.jsonl"
LINES_BETWEEN_SYNCS = 256


class Journal:
    """A directory of settings and lines. A line is known by its id: an id that is there is never written again."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Open or begin a journal. Raises UserError where it was begun with other settings or is being written to."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.file = (directory / LINES).open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise UserError(f"another process is writing to {directory}; wait for it or stop it") from error
        try:
            self.check(settings)
            self.places: dict[bytes, int] = {}
            self.end = self.index()
        except BaseException:
            self.file.close()
            raise
        self.unsynced = 0

    def check(self, settings: dict[str, Any]) -> None:
        """Raises UserError where the journal's settings are others."""
        path = self.directory / SETTINGS
        if not path.exists():
            with replacing_file(path) as fresh:
                fresh.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            return
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is truncated or corrupted; delete {self.directory} to start over") from error
        check_same(begun, settings, self.directory)

    def index(self) -> int:
        """Find every line; what a kill left of a last one is cut off. Returns where the next begins."""
        place = 0
        self.file.seek(0)
        with os.fdopen(os.dup(self.file.fileno()), "rb") as lines:
            for line in lines:
                try:
                    key = bytes.fromhex(json.loads(line)["id"]) if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    key = None
                if key is None:
                    break
                self.places.setdefault(key, place)
                place += len(line)
        if place < self.file.seek(0, os.SEEK_END):
            self.file.truncate(place)
        return place

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self.places

    def __len__(self) -> int:
        return len(self.places)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append the record of an id that is not there yet."""
        assert key not in self, "an id is answered once"
        line = json.dumps({"id": key, **record}, ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            whole = self.file.write(line) == len(line)
        except OSError:
            whole = False
        if not whole:
            self.file.truncate(self.end)
            raise UserError(f"{self.directory} cannot be written to any more; make room on the disk and start again")
        self.places[bytes.fromhex(key)] = self.end
        self.end += len(line)
        self.unsynced += 1
        if self.unsynced >= LINES_BETWEEN_SYNCS:  # a kill loses nothing; this is for power cuts
            os.fsync(self.file.fileno())
            self.unsynced = 0

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of an id, None where there is none."""
        place = self.places.get(bytes.fromhex(key))
        if place is None:
            return None
        with (self.directory / LINES).open("rb") as lines:
            lines.seek(place)
            return json.loads(lines.readline())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file.closed:
            return
        if not self.places:  # nothing to go on from
            self.remove()
            return
        os.fsync(self.file.fileno())
        self.file.close()

    def remove(self) -> None:
        """Delete the journal: what it held lies elsewhere, whole."""
        self.file.close()
        shutil.rmtree(self.directory)


def check_same(begun: dict[str, Any], settings: dict[str, Any], where: Path) -> None:
    """Raises UserError naming the first setting that differs from those a run was begun with."""
    for name in {**begun, **settings}:
        if begun.get(name) != settings.get(name):
            raise UserError(
                f"{where} was begun with {name} {begun.get(name)!r}, now it is {settings.get(name)!r}; "
                "restore it, or pass another --out"
            )
