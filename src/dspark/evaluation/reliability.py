"""How well a drafter knows itself: its confidences' scores by position, from rounds that were verified in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dspark.speculation.reliability import RoundRecord, conditional_samples, reliability, survival_samples


def by_position(records: Sequence[RoundRecord]) -> dict[str, list[dict[str, Any]]]:
    """Scores at every position, first to last: of c_k where the position was reached, and of a_k = c_1 · … · c_k.

    Rounds that the plan cut are left out: it cut where confidence was low, so what is left is no fair sample.
    """
    whole = [record for record in records if record.full]
    positions = range(max((record.verified for record in whole), default=0))
    return {
        "conditional": [asdict(reliability(*conditional_samples(whole, k))) for k in positions],
        "survival": [asdict(reliability(*survival_samples(whole, k))) for k in positions],
    }


def threshold_sweep(
    records: Sequence[RoundRecord], *, undrafted: int = 0, steps: int = 20
) -> list[dict[str, float | None]]:
    """What a plan `threshold:C` would have verified and accepted of the rounds that were verified in full, by C.

    `undrafted` rounds had nothing to verify: each is a token whatever the threshold. The same rounds are cut at every
    threshold, so the curve has no noise between its points; only which rounds come about would differ a little in
    a run of its own.
    """
    whole = [record for record in records if record.full]
    return [sweep_point(whole, step / steps, undrafted) for step in range(steps)] if whole else []


def sweep_point(records: Sequence[RoundRecord], threshold: float, undrafted: int) -> dict[str, float | None]:
    """One threshold's means over rounds; no acceptance rate where it lets nothing through."""
    lengths = [next((k for k, c in enumerate(r.confidence) if c < threshold), len(r.confidence)) for r in records]
    accepted = sum(min(length, record.accepted) for length, record in zip(lengths, records, strict=True))
    rounds = len(records) + undrafted
    return {
        "threshold": threshold,
        "tau": 1 + accepted / rounds,
        "verified": sum(lengths) / rounds,
        "acceptance_rate": accepted / sum(lengths) if sum(lengths) else None,
    }
