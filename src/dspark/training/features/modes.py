"""Which of the three feature modes a recipe asks for, and what it takes on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.training.data import Documents
from dspark.training.features.cached import CachedFeatures
from dspark.training.features.encoding import FORMATS, Encoding
from dspark.training.features.online import OnlineTarget
from dspark.training.features.store import MemoryStore, ShardStore, Store

MODES = ("online", "cached", "hybrid")
MEMORY = "memory"
ABOUT = "about.json"


@dataclass(frozen=True)
class FeatureConfig:
    """Where the target's hidden states come from. Held-out text always meets the target itself."""

    mode: str = "online"  # online: from the target in every step. cached: all made first. hybrid: kept as they come
    directory: str = ""  # of the shards: "" for the run's own, "memory" for none
    format: str = "bfloat16"  # or float8, half as large
    budget_gb: float = 0.0  # at most this much is kept; 0 for no bound

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("format", self.format, tuple(FORMATS))):
            if value not in known:
                raise UserError(f"features: {name} {value!r} is not known; use {', '.join(known)}")
        if self.budget_gb < 0:
            raise UserError(f"features: budget_gb is {self.budget_gb}; give 0 (no bound) or more")


def open_features(
    config: FeatureConfig,
    target: OnlineTarget,
    data: Documents,
    directory: str | Path,
    *,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> OnlineTarget | CachedFeatures:
    """The features of `data` as the config says; in mode cached, all of them are there when this returns.

    `directory` is used where the config names none. `share` = (rank, ranks): which pieces this process makes first.
    Raises UserError where the directory holds features of another target, other data or another format.
    """
    if config.mode == "online":
        return target
    encoding = Encoding(config.format, len(target.taps) * target.hidden, target.hidden)
    admitted = admitted_pieces(data, encoding, config.budget_gb)
    store: Store
    if config.directory == MEMORY:
        store = MemoryStore()
    else:
        place = Path(config.directory or directory)
        describe(place, {"format": config.format, "length": data.length, **identity(target), "data": data_sum(data)})
        store = ShardStore(place)
    cached = CachedFeatures(target, store, encoding, lambda piece: piece < admitted)
    if config.mode == "cached":
        rank, ranks = share
        fill(cached, data, range(rank, admitted, ranks), progress)
    return cached


def fill(
    cached: CachedFeatures,
    data: Documents,
    pieces: Iterable[int],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Make and keep the features of pieces that the store lacks; killed and called again, it goes on."""
    device = next(cached.target.decoder.parameters()).device
    for piece in progress(pieces):
        if cached.store.get(piece) is None:
            cached(data.batch([(piece,)]).to(device))
    cached.store.flush()


def piece_bytes(data: Documents, encoding: Encoding) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What each piece takes."""
    sizes = zip(data.pieces, kept_positions(data), strict=True)
    return np.asarray([encoding.size(end - start, kept) for (start, end), kept in sizes], dtype=np.int64)


def kept_positions(data: Documents) -> list[int]:
    """Of each piece, how many last hidden states are kept: of supervised tokens whose next one is supervised."""
    masks = (data.mask[start:end] > 0 for start, end in data.pieces)
    return [int((mask[:-1] & mask[1:]).sum()) for mask in masks]


def admitted_pieces(data: Documents, encoding: Encoding, budget_gb: float) -> int:
    """How many pieces, from the first on, fit into a budget: known before any is made, so that a resumed run agrees."""
    if not budget_gb:
        return len(data.pieces)
    return int(np.searchsorted(piece_bytes(data, encoding).cumsum(), budget_gb * 1e9, side="right"))


def identity(target: OnlineTarget) -> dict[str, Any]:
    """Enough of a target to tell it from another: its config and the bytes of some of its weights."""
    config = target.decoder.config.to_dict()
    for changing in ("_name_or_path", "transformers_version"):  # the same target, moved or loaded by another version
        config.pop(changing, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    parameters = list(target.decoder.parameters())
    for parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        rows = parameter.detach().reshape(-1)[:65536].float().cpu()
        digest.update(rows.numpy().tobytes())
    return {"target": digest.hexdigest()[:16], "taps": list(target.taps), "dtype": str(parameters[0].dtype)}


def data_sum(data: Documents) -> str:
    """A checksum of tokens, mask and offsets."""
    digest = hashlib.sha256()
    for array in (data.tokens, data.mask, data.offsets):
        for start in range(0, len(array), 1 << 24):
            digest.update(array[start : start + (1 << 24)].tobytes())
    return digest.hexdigest()[:16]


def describe(directory: Path, about: dict[str, Any]) -> None:
    """Say what a directory of features holds, or raise UserError where it already holds something else."""
    path = directory / ABOUT
    if not path.is_file():
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {directory}, it is made again") from error
    for name, value in about.items():
        if there.get(name) != value:
            raise UserError(
                f"{directory} holds features of {name} {there.get(name)!r}, this run has {value!r}; "
                "delete it, or name another features: directory"
            )
