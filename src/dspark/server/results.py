"""Finished answers kept under idempotency keys: the interface, and the file of one server."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from dspark.common.errors import UserError
from dspark.server.errors import LOG

MEMORY = ":memory:"
VERSION = 1
MOST_BYTES = 256 << 20  # of all answers in a file
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Kept:
    """An answer, and the fingerprint of the request it answers."""

    fingerprint: str
    status: int
    media_type: str
    body: bytes


@dataclass(frozen=True)
class Busy:
    """Another server is making the answer to the request of this fingerprint."""

    fingerprint: str


class Results(Protocol):
    """Where answers are kept. Only one maker of a key's answer is let in at a time, whichever server asks."""

    async def begin(self, key: str, fingerprint: str) -> Kept | Busy | None:
        """What is kept under `key`; None tells the caller to make it, then to `keep` or `release`."""
        ...

    async def keep(self, key: str, kept: Kept) -> None:
        """Keep an answer that `begin` had its caller make; it is safe when this returns."""
        ...

    async def release(self, key: str, fingerprint: str) -> None:
        """Let somebody else make the answer."""
        ...

    async def close(self) -> None:
        """Write what is left and let go of the file or the connection."""
        ...


class FileResults:
    """Answers in an SQLite file that one server has to itself; reads and writes wait in a thread of their own.

    What is being made needs no row: if the server dies, so does the making. Expired answers go, and the oldest where
    all together are larger than `most_bytes`.
    """

    def __init__(self, path: str | Path, *, seconds: float, most_bytes: int):
        """Opens or makes the file, or keeps answers in memory at ":memory:". Raises UserError if it cannot."""
        self.path, self.seconds, self.most_bytes = str(path), seconds, most_bytes
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dspark-results")
        self._database = self._thread.submit(self._open).result()

    async def begin(self, key: str, fingerprint: str) -> Kept | Busy | None:
        """Reads; never busy, for nobody else has this file."""
        return await self._do(lambda: self._find(key))

    async def keep(self, key: str, kept: Kept) -> None:
        """On the disk when it returns."""
        await self._do(lambda: self._keep(key, kept))

    async def release(self, key: str, fingerprint: str) -> None:
        """Nothing was written yet."""

    async def close(self) -> None:
        """The file is whole and another server may open it."""
        await self._do(self._database.close)
        self._thread.shutdown()

    async def _do(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> sqlite3.Connection:
        try:
            if self.path != MEMORY:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # answers are nobody else's business
            database = sqlite3.connect(self.path, timeout=0.5, isolation_level=None)
            database.execute("PRAGMA locking_mode = EXCLUSIVE")  # held to the end of the process, however it ends
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise UserError(f"{self.path} is of version {version}, this server writes {VERSION}; pass another file")
            database.execute(
                "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, made REAL NOT NULL, fingerprint TEXT NOT NULL,"
                " status INTEGER NOT NULL, media_type TEXT NOT NULL, body BLOB NOT NULL) WITHOUT ROWID"
            )
            database.execute("CREATE INDEX IF NOT EXISTS by_age ON kept (made)")
            database.execute(f"PRAGMA user_version = {VERSION}")
            self._bytes = database.execute("SELECT coalesce(sum(length(body)), 0) FROM kept").fetchone()[0]
        except (OSError, sqlite3.Error) as error:
            why = "another server has it" if "locked" in str(error) else str(error)
            raise UserError(
                f"cannot keep answers in {self.path}: {why}; pass --idempotency another file, a redis:// URL, or off"
            ) from error
        return database

    def _find(self, key: str) -> Kept | None:
        query = "SELECT fingerprint, status, media_type, body FROM kept WHERE key = ? AND made > ?"
        row = self._database.execute(query, (key, time.time() - self.seconds)).fetchone()
        return Kept(*row) if row is not None else None

    def _keep(self, key: str, kept: Kept) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._forget("key = ?", key)
            self._forget("made <= ?", time.time() - self.seconds)
            excess = self._bytes + len(kept.body) - self.most_bytes
            while excess > 0 and self._bytes:
                (oldest,) = self._database.execute("SELECT min(made) FROM kept").fetchone()
                before = self._bytes
                self._forget("made <= ?", oldest)
                excess -= before - self._bytes
            row = (key, time.time(), kept.fingerprint, kept.status, kept.media_type, kept.body)
            self._database.execute("INSERT INTO kept VALUES (?, ?, ?, ?, ?, ?)", row)
            self._database.execute("COMMIT")
            self._bytes += len(kept.body)
        except BaseException:
            self._database.execute("ROLLBACK")
            self._bytes = self._database.execute("SELECT coalesce(sum(length(body)), 0) FROM kept").fetchone()[0]
            raise

    def _forget(self, which: str, value: str | float) -> None:
        query = f"DELETE FROM kept WHERE {which} RETURNING length(body)"
        self._bytes -= sum(size for (size,) in self._database.execute(query, (value,)).fetchall())


def open_results(where: str | None, usual: str | Path, *, seconds: float) -> Results | None:
    """What `dspark serve --idempotency WHERE` means: off, a redis:// URL, ":memory:" or a file; None is `usual`.

    Raises UserError for what was asked for and cannot be had; without the usual file answers are kept in memory.
    """
    if where == "off":
        return None
    if where is not None and where.startswith(("redis://", "rediss://", "unix://")):
        from dspark.server.redis_results import RedisResults

        return RedisResults(where, seconds=seconds)
    try:
        return FileResults(where or usual, seconds=seconds, most_bytes=MOST_BYTES)
    except UserError as error:
        if where is not None:
            raise
        LOG.warning("%s; until then answers are kept in memory", error)
        return FileResults(MEMORY, seconds=seconds, most_bytes=MOST_BYTES)


def usual_file(name: str, port: int) -> Path:
    """This user's file for a server of this model and port, so that the next server there finds it again."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "dspark" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}-{port}.answers"
