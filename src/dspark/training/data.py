"""Token documents on disk, memory-mapped, and the sequences that training reads from them.

A directory holds `tokens.npy` (uint16 or uint32, all documents one after another), `offsets.npy` (int64, where each
begins, and the end) and `mask.npy` (uint8, 1 where the target wrote the token and the loss counts).
B rows, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.training.packing import Packing, Row

Document = tuple[Sequence[int], Sequence[int]]
"""(token ids, loss mask), of equal length."""


def write_documents(
    directory: str | Path, documents: Iterable[Document], *, vocabulary: int, about: dict[str, Any] | None = None
) -> int:
    """Write documents whole or not at all, with `about` beside them. Returns the number of tokens.

    Documents are written as they come: what stays in memory is 8 bytes for each.
    """
    kind = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    offsets = [0]
    with replacing_directory(directory) as fresh:
        with GrowingArray(fresh / "tokens.npy", kind) as tokens, GrowingArray(fresh / "mask.npy", np.uint8) as masks:
            for ids, mask in documents:
                assert len(ids) == len(mask), "a mask as long as its document"
                tokens.append(ids)
                masks.append(mask)
                offsets.append(tokens.length)
        if not tokens.length:
            raise UserError(f"no tokens to write to {directory}; check the prompts and the generator")
        np.save(fresh / "offsets.npy", np.asarray(offsets, dtype=np.int64))
        (fresh / "about.json").write_text(json.dumps(about or {}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return tokens.length


class GrowingArray:
    """A one-dimensional .npy file written a piece at a time; its header, which says the length, is written last."""

    def __init__(self, path: Path, kind: type[np.unsignedinteger[Any]]) -> None:
        self.kind, self.length = np.dtype(kind), 0
        self.file = path.open("wb")
        self.header()

    def header(self) -> None:
        """The header for the length so far. Its size is the same for any length: numpy leaves room to grow."""
        self.file.seek(0)
        described = {"descr": np.lib.format.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, described)

    def append(self, values: Sequence[int]) -> None:
        """Write more numbers."""
        self.file.write(np.asarray(values, dtype=self.kind).tobytes())
        self.length += len(values)

    def __enter__(self) -> GrowingArray:
        return self

    def __exit__(self, *_: object) -> None:
        self.header()
        self.file.close()


class Span(NamedTuple):
    """Where a piece lies in a batch: positions [begin, end) of a row."""

    piece: int
    row: int
    begin: int
    end: int


class Batch(NamedTuple):
    """Rows of packed documents; padding on the right is a document of its own, of token 0 with mask false."""

    token_BS: Tensor  # int64
    mask_BS: Tensor  # bool, supervised
    start_BS: Tensor  # int64, where in its row the document of each position begins
    pieces: tuple[Row, ...]  # the numbers of the pieces in each row, in order

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.token_BS.to(device), self.mask_BS.to(device), self.start_BS.to(device), self.pieces)

    @property
    def spans(self) -> list[Span]:
        """Every piece, row by row."""
        found = []
        for row, (pieces, start_S) in enumerate(zip(self.pieces, self.start_BS.cpu(), strict=True)):
            bounds = [*start_S.unique_consecutive().tolist(), len(start_S)]
            found += [Span(piece, row, bounds[i], bounds[i + 1]) for i, piece in enumerate(pieces)]
        return found


class Documents:
    """Documents cut into pieces of at most `length` tokens that hold something to learn, and packed into rows.

    A row has up to `row_tokens` tokens of whole pieces; 0 for one piece a row.
    """

    def __init__(self, directory: str | Path, length: int, row_tokens: int = 0) -> None:
        self.directory = Path(directory)
        self.tokens, self.mask, self.offsets = (read(directory, name) for name in ("tokens", "mask", "offsets"))
        self.length = length
        if len(self.tokens) != len(self.mask) or len(self.tokens) != self.offsets[-1]:
            raise UserError(
                f"{directory} has {len(self.tokens)} tokens, {len(self.mask)} mask values and offsets up to "
                f"{self.offsets[-1]}; write it again"
            )
        self.pieces = [
            (start, min(start + length, end))
            for begin, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)
            for start in range(begin, end, length)
            if self.mask[start : min(start + length, end)].sum() > 1
        ]
        if not self.pieces:
            raise UserError(f"{directory} has no supervised tokens; check its mask.npy")
        self.packing = Packing([end - start for start, end in self.pieces], row_tokens)

    def __len__(self) -> int:
        """How many rows an epoch has."""
        return len(self.packing)

    def size(self, row: Row) -> int:
        """How many tokens a row's pieces have."""
        return sum(end - start for start, end in (self.pieces[number] for number in row))

    def rows(self, step: int, batch: int, seed: int) -> list[Row]:
        """What step `step` reads: a new shuffle every epoch, a function of seed and step alone."""
        return self.packing.rows(step, batch, seed)

    def spread(self, count: int) -> list[Row]:
        """Up to `count` rows, always the same, evenly spaced."""
        rows = self.packing.plain()
        count = min(count, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """These rows, as wide as the widest."""
        shape = len(rows), max(self.size(row) for row in rows)
        token_BS, mask_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        start_BS = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            place = 0
            for number in row:
                start, end = self.pieces[number]
                here = slice(place, place + end - start)
                token_BS[index, here] = torch.from_numpy(self.tokens[start:end].astype(np.int64))
                mask_BS[index, here] = torch.from_numpy(self.mask[start:end] > 0)
                start_BS[index, place:] = place
                place = here.stop
            start_BS[index, place:] = place
        return Batch(token_BS, mask_BS, start_BS, tuple(rows))


def read(directory: str | Path, name: str) -> np.ndarray[Any, Any]:
    """One memory-mapped array of a data directory. Raises UserError for a missing or damaged file."""
    path = Path(directory, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{directory} has no {name}.npy; pass a directory made by `write_documents`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupted ({str(error).splitlines()[0]}); write it again") from error
