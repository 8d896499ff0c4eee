"""Numbered pieces of bytes, kept in memory or in shards on disk that are whole or absent.

A shard is one file: the pieces' bytes one after another, then an index in JSON, then 16 bytes: the index's length and
checksum and a magic word. It takes its name only when it is complete, and is never written again. Every piece has a
checksum, looked at the first time it is read.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct
import threading
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.common.files import replacing_file

MAGIC = b"dspark01"
FOOTER = struct.Struct("<II8s")
SHARD_BYTES = 64 << 20  # of pieces that wait in memory; a kill costs no more than these


class Store(Protocol):
    """Bytes by piece. Safe to use from several threads."""

    def get(self, piece: int) -> Tensor | None:
        """uint8, or None for a piece that is not there."""
        ...

    def put(self, piece: int, data: Tensor) -> None:
        """Keep a piece; one that is there already stays as it is."""
        ...

    def flush(self) -> None:
        """Whatever was put survives a kill from here on."""
        ...


class MemoryStore:
    """Pieces in a dict: for small targets and little text."""

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}

    def get(self, piece: int) -> Tensor | None:
        return self.pieces.get(piece)

    def put(self, piece: int, data: Tensor) -> None:
        self.pieces.setdefault(piece, data)

    def flush(self) -> None:
        """Memory does not survive."""


class Place(NamedTuple):
    """Bytes [begin, end) of a mapped shard."""

    path: Path
    shard: mmap.mmap
    begin: int
    end: int
    checksum: int


class ShardStore:
    """Pieces in a directory of memory-mapped shards, which several processes may fill together."""

    def __init__(self, directory: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self.places: dict[int, Place] = {}
        self.known: set[str] = set()
        self.checked: set[int] = set()
        self.waiting: dict[int, Tensor] = {}
        self.lock = threading.RLock()
        self.changed = -1
        sweep(self.directory)
        self.refresh()

    def refresh(self) -> None:
        """Learn of shards that were written since, by anyone."""
        changed = self.directory.stat().st_mtime_ns if self.directory.is_dir() else -1
        if changed == self.changed:
            return
        self.changed = changed
        for path in sorted(self.directory.glob("*.shard")):
            if path.name not in self.known:
                self.known.add(path.name)
                for piece, place in read_index(path).items():
                    self.places.setdefault(piece, place)

    def get(self, piece: int) -> Tensor | None:
        with self.lock:
            if piece in self.waiting:
                return self.waiting[piece]
            if piece not in self.places:
                self.refresh()
            place = self.places.get(piece)
            if place is None:
                return None
            data = place.shard[place.begin : place.end]
            if piece not in self.checked and zlib.crc32(data) != place.checksum:
                raise UserError(f"{place.path} is corrupted at piece {piece}; delete the file, it is made again")
            self.checked.add(piece)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def put(self, piece: int, data: Tensor) -> None:
        with self.lock:
            if piece in self.places or piece in self.waiting:
                return
            self.waiting[piece] = data
            if sum(x.numel() for x in self.waiting.values()) >= self.shard_bytes:
                self.flush()

    def flush(self) -> None:
        with self.lock:
            if not self.waiting:
                return
            path = self.directory / f"{min(self.waiting):08d}-{secrets.token_hex(4)}.shard"
            try:
                write_shard(path, self.waiting)
            except OSError as error:
                raise UserError(
                    f"cannot write {path} ({error.strerror or error}); free space, or set a smaller budget_gb"
                ) from error
            self.known.add(path.name)
            self.places.update(read_index(path))
            self.waiting = {}


def write_shard(path: Path, pieces: dict[int, Tensor]) -> None:
    """Write pieces as one file, whole or not at all."""
    index, place = [], 0
    with replacing_file(path) as fresh, fresh.open("wb") as file:
        for piece, data in sorted(pieces.items()):
            raw = data.numpy().tobytes()
            file.write(raw)
            index.append((piece, place, place + len(raw), zlib.crc32(raw)))
            place += len(raw)
        described = json.dumps(index).encode()
        file.write(described + FOOTER.pack(len(described), zlib.crc32(described), MAGIC))
        file.flush()
        os.fsync(file.fileno())


def read_index(path: Path) -> dict[int, Place]:
    """Where the pieces of a shard are. Raises UserError for a damaged one."""
    try:
        with path.open("rb") as file:
            shard = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length, checksum, magic = FOOTER.unpack(shard[-FOOTER.size :])
        described = shard[-FOOTER.size - length : -FOOTER.size]
        if magic != MAGIC or zlib.crc32(described) != checksum:
            raise ValueError("its index does not add up")
        return {piece: Place(path, shard, begin, end, crc) for piece, begin, end, crc in json.loads(described)}
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); delete the file, it is made again") from error


def sweep(directory: Path) -> None:
    """Remove what processes that were killed left half written."""
    for path in directory.glob(".*.shard.*"):
        try:
            os.kill(int(path.suffix[1:]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue
