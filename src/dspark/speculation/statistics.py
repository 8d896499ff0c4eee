"""Counts what speculation did, per request and in sum: rounds, drafted, verified, accepted, by position."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class SpeculationStatistics:
    """Counts over rounds. Position 0 is the first drafted token; only verified positions have outcomes."""

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    committed: int = 0  # accepted tokens and one correction or bonus per round, less what a stop cut off
    verified_at: list[int] = field(default_factory=list)  # rounds in which position k was verified
    reached_at: list[int] = field(default_factory=list)  # ... and everything before it accepted
    accepted_at: list[int] = field(default_factory=list)  # ... and itself accepted

    def observe(self, *, drafted: int, verified: int, accepted: int, committed: int | None = None) -> None:
        """Count one round of one request; `committed` only if it is not accepted + 1."""
        self.rounds += 1
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted
        self.committed += accepted + 1 if committed is None else committed
        self._grow(verified)
        for k in range(verified):
            self.verified_at[k] += 1
        for k in range(min(accepted + 1, verified)):
            self.reached_at[k] += 1
        for k in range(accepted):
            self.accepted_at[k] += 1

    def merge(self, other: SpeculationStatistics) -> None:
        """Add the counts of `other` to this."""
        for name in ("rounds", "drafted", "verified", "accepted", "committed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._grow(len(other.verified_at))
        for name in ("verified_at", "reached_at", "accepted_at"):
            mine = getattr(self, name)
            for k, count in enumerate(getattr(other, name)):
                mine[k] += count

    @property
    def tokens_per_round(self) -> float:
        """τ: committed tokens per round, correction or bonus included; 0 before the first round."""
        return self.committed / self.rounds if self.rounds else 0.0

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """P(position k accepted given all before it accepted and it was verified); None where never tried."""
        pairs = zip(self.accepted_at, self.reached_at, strict=True)
        return [accepted / reached if reached else None for accepted, reached in pairs]

    def _grow(self, positions: int) -> None:
        for counts in (self.verified_at, self.reached_at, self.accepted_at):
            counts.extend([0] * (positions - len(counts)))


def total(statistics: Iterable[SpeculationStatistics]) -> SpeculationStatistics:
    """The sum of the counts of many requests."""
    result = SpeculationStatistics()
    for one in statistics:
        result.merge(one)
    return result
