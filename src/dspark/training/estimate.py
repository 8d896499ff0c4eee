"""What the target's hidden states will cost, in bytes and in time, for each way of having them, before anything starts.

k taps, D hidden size.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

from dspark.common.errors import UserError
from dspark.models.loading import load_causal_lm
from dspark.training.data import Documents
from dspark.training.features.encoding import FORMATS, Encoding
from dspark.training.features.modes import kept_positions
from dspark.training.features.online import OnlineTarget

SHORT = {"bfloat16": "bf16", "float8": "fp8"}


@dataclass(frozen=True)
class Counts:
    """What a pass over the data reads: pieces, their tokens, and those whose last hidden state a loss can use."""

    tokens: int
    supervised: int  # supervised tokens whose next token is supervised too
    pieces: int

    @staticmethod
    def of(data: Documents) -> Counts:
        """Count token documents."""
        tokens = sum(end - begin for begin, end in data.pieces)
        return Counts(tokens, sum(kept_positions(data)), len(data.pieces))


@dataclass(frozen=True)
class Rates:
    """Tokens the target reads and bytes the disk moves, in a second."""

    tokens: float
    disk: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"a rate of {value} {name} a second leads nowhere; pass one above 0")


@dataclass(frozen=True)
class Estimate:
    """One way of having features. Times are of the features alone; the drafter's own steps come on top."""

    mode: str
    bytes: int  # on disk
    share: float  # of the pieces that are kept there
    before: float  # seconds before the first step
    during: float  # seconds of all epochs

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.before + self.during


def estimates(
    counts: Counts, *, taps: int, hidden: int, epochs: int, rates: Rates, budget: float = 0.0
) -> list[Estimate]:
    """Online, and cached and hybrid in every format; `budget` bytes may be kept, 0 for no bound.

    Kept features are made once, at the target's rate, written once, and read in every epoch that does not make them;
    what is past the budget is made in every epoch.
    """
    target = counts.tokens / rates.tokens  # seconds of a pass of the target over everything
    found = [Estimate("online", 0, 0.0, 0.0, epochs * target)]
    for mode, name in itertools.product(("cached", "hybrid"), FORMATS):
        whole = kept_bytes(counts, Encoding(name, taps * hidden, hidden))
        share = min(1.0, budget / whole) if budget else 1.0
        disk = share * whole / rates.disk  # seconds to write or read what is kept
        make, rest = share * target + disk, (1 - share) * target
        before, reads = (make, epochs) if mode == "cached" else (0.0, epochs - 1)
        during = reads * disk + epochs * rest + (make if mode == "hybrid" else 0.0)
        found.append(Estimate(f"{mode} {SHORT[name]}", round(share * whole), share, before, during))
    return found


def kept_bytes(counts: Counts, encoding: Encoding) -> int:
    """All pieces encoded: the numbers of all tokens, and what every piece has beside them."""
    return encoding.size(counts.tokens, counts.supervised) + (counts.pieces - 1) * encoding.scales


def measured(model: str, data: Documents, *, dtype: str = "auto", device: str = "auto") -> float:
    """Tokens a second of a model on this machine. Raises UserError for a model that cannot be loaded."""
    return throughput(OnlineTarget(load_causal_lm(model, dtype=dtype, device=device), ()), data)


def throughput(target: OnlineTarget, data: Documents, *, rows: int = 4, seconds: float = 3.0) -> float:
    """Tokens a second of the target on batches of `rows` rows spread over the data, after one that is not counted."""
    device = next(target.decoder.parameters()).device
    chosen = data.spread(64)
    batches = [data.batch(chosen[i : i + rows]).to(device) for i in range(0, len(chosen), rows)]
    tokens, started = 0, 0.0
    for number, batch in enumerate(itertools.cycle(batches)):
        target(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number == 0:
            started = time.monotonic()
            continue
        tokens += batch.token_BS.numel()
        if time.monotonic() - started >= seconds:
            break
    return tokens / (time.monotonic() - started)
