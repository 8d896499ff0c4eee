"""`dspark data stats`: how much there is to learn from, how long it is, and what share of it the target wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark.common.errors import UserError
from dspark.training.data import read
from dspark.training.samples import FORMAT as SAMPLES
from dspark.training.samples import SPLITS, read_about, read_samples

PERCENTILES = (5, 50, 95, 99)


def statistics(directory: str | Path) -> dict[str, dict[str, Any]]:
    """Numbers by split, or under "all" for a directory that is one set of token documents.

    Raises UserError for a directory that was not written by `dspark data`.
    """
    path = Path(directory)
    if (path / "tokens.npy").exists():
        return {"all": of_tokens(path)}
    if read_about(path).get("format") == SAMPLES:
        return {split: of_samples(path, split) for split in SPLITS if (path / f"{split}.arrow").exists()}
    found = {split: of_tokens(path / split) for split in SPLITS if (path / split / "tokens.npy").exists()}
    if not found:
        raise UserError(f"{directory} holds neither samples nor tokens; pass a directory made by `dspark data`")
    return found


def of_tokens(directory: Path) -> dict[str, Any]:
    """Tokens, supervised tokens, lengths and bytes of token documents."""
    tokens, mask, offsets = (read(directory, name) for name in ("tokens", "mask", "offsets"))
    if len(tokens) != len(mask) or len(tokens) != offsets[-1]:
        raise UserError(f"{directory} has {len(tokens)} tokens and {len(mask)} mask values; write it again")
    supervised = np.add.reduceat(mask, offsets[:-1], dtype=np.int64)
    return {
        "documents": len(offsets) - 1,
        "tokens": len(tokens),
        "supervised": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / len(tokens)),
        "distinct_tokens": int(np.count_nonzero(np.bincount(tokens))),
        "bytes": sum(file.stat().st_size for file in directory.glob("*.npy")),
        "length": spread(np.diff(offsets)),
        "supervised_in_each": spread(supervised),
    }


def of_samples(directory: Path, split: str) -> dict[str, Any]:
    """Conversations and texts before they are tokens: turns, characters, and how the target's answers ended."""
    kinds, endings, turns, characters = Counter[str](), Counter[str](), [], []
    for sample in read_samples(directory, split):
        kinds["texts" if sample.messages is None else "conversations"] += 1
        endings.update(sample.endings)
        turns.append(sum(message["role"] == "user" for message in sample.messages or ()))
        characters.append(sample.characters)
    if not characters:
        raise UserError(f"{directory} has no samples in {split}; import it again")
    return {
        "samples": len(characters),
        **kinds,
        "characters": sum(characters),
        "bytes": (directory / f"{split}.arrow").stat().st_size,
        **({"user_turns": spread(turns)} if any(turns) else {}),
        "length_in_characters": spread(characters),
        "endings": dict(endings),
    }


def spread(values: Sequence[int] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean, percentiles and extremes."""
    found = np.asarray(values)
    percentiles = np.percentile(found, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(found.mean()), "min": float(found.min()), **named, "max": float(found.max())}
