"""How far confidences can be believed: what they said beside what was accepted, and its scores.

N samples, R rounds, K draft slots. (DSpark, §3.2.1: a confidence is of use to a planner only as a probability.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 20


@dataclass(frozen=True)
class RoundRecord:
    """One request's round: what the drafter thought of each drafted token, and what became of them."""

    request_id: int
    confidence: tuple[float, ...]  # the drafter's own c_k, one for each drafted token that the request had room for
    verified: int  # 0..len(confidence); what the plan cut off has no outcome
    accepted: int  # 0..verified
    features: tuple[tuple[float, ...], ...] = ()  # of each drafted token, where a confidence was made of some

    @property
    def full(self) -> bool:
        """Whether the plan cut nothing off, so that no outcome is censored."""
        return self.verified == len(self.confidence)


Observer = Callable[[Sequence[RoundRecord]], None]
"""Gets the records of every step in which something was drafted, once a step, in the order of the requests."""


@dataclass(frozen=True)
class Bin:
    """Samples of neighbouring probabilities: one point of a reliability diagram."""

    mean: float  # of the probabilities
    accepted: float  # share
    count: int


@dataclass(frozen=True)
class Reliability:
    """Scores of one set of probabilities; None where there are too few samples to say."""

    samples: int
    mean: float | None  # of the probabilities
    accepted: float | None  # share
    ece: float | None  # 0 is best
    auroc: float | None  # 1 is best, 0.5 knows nothing; None when all outcomes are the same
    brier: float | None  # 0 is best
    bins: tuple[Bin, ...]  # only those that hold a sample


def reliability(probability_N: Tensor, outcome_N: Tensor, bins: int = BINS) -> Reliability:
    """All scores of probabilities in 0..1 against outcomes 0 or 1."""
    if not len(probability_N):
        return Reliability(0, None, None, None, None, None, ())
    p_N, y_N = probability_N.double(), outcome_N.double()
    points = reliability_bins(p_N, y_N, bins)
    return Reliability(
        samples=len(p_N),
        mean=float(p_N.mean()),
        accepted=float(y_N.mean()),
        ece=expected_calibration_error(p_N, y_N, bins),
        auroc=auroc(p_N, y_N),
        brier=float((p_N - y_N).square().mean()),
        bins=points,
    )


def reliability_bins(probability_N: Tensor, outcome_N: Tensor, bins: int = BINS) -> tuple[Bin, ...]:
    """Samples in `bins` equal parts of 0..1, without empty ones; a bound belongs to the part above, 1 to the last."""
    count_b, mean_b, accepted_b = _binned(probability_N, outcome_N, bins)
    rows = zip(mean_b.tolist(), accepted_b.tolist(), count_b.tolist(), strict=True)
    return tuple(Bin(mean, accepted, int(count)) for mean, accepted, count in rows if count)


def expected_calibration_error(probability_N: Tensor, outcome_N: Tensor, bins: int = BINS) -> float:
    """Σ_b (n_b / N) |mean probability − share accepted| over equal bins; 0 without samples. (DSpark, §3.2.1)"""
    count_b, mean_b, accepted_b = _binned(probability_N, outcome_N, bins)
    return float((count_b * (mean_b - accepted_b).abs()).sum() / count_b.sum().clamp(min=1))


def auroc(score_N: Tensor, outcome_N: Tensor) -> float | None:
    """The chance that an accepted sample has a higher score than a rejected one, ties half; None without both."""
    yes_N = outcome_N > 0.5
    positives, negatives = int(yes_N.sum()), int((~yes_N).sum())
    if not positives or not negatives:
        return None
    _, place_N, count_U = torch.unique(score_N, return_inverse=True, return_counts=True)
    rank_U = count_U.cumsum(0) - (count_U - 1) / 2  # mean rank of equal scores, from 1
    rank_sum = float(rank_U.double()[place_N][yes_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def conditional_samples(records: Iterable[RoundRecord], position: int) -> tuple[Tensor, Tensor]:
    """(c_k, accepted) at a 0-based position, of the rounds that verified it after accepting all before it, [N] each."""
    reached = [r for r in records if r.verified > position and r.accepted >= position]
    return _samples([r.confidence[position] for r in reached], [r.accepted > position for r in reached])


def survival_samples(records: Iterable[RoundRecord], position: int) -> tuple[Tensor, Tensor]:
    """(c_1 · … · c_k, the whole prefix accepted) at a 0-based position, [N] each. (DSpark, eq. 8)

    Of full rounds alone: the outcome of one that the plan cut short may be unknown, and which are known is no accident.
    """
    whole = [r for r in records if r.full and r.verified > position]
    products = [float(torch.tensor(r.confidence[: position + 1], dtype=torch.float64).prod()) for r in whole]
    return _samples(products, [r.accepted > position for r in whole])


def pooled_error(records: Sequence[RoundRecord], bins: int = BINS) -> float | None:
    """Expected calibration error of c_1 · … · c_k over all positions of full rounds at once; None without any."""
    whole = [r for r in records if r.full and r.verified]
    if not whole:
        return None
    slots = max(r.verified for r in whole)
    confidence_RK = torch.tensor([[*r.confidence, *[0.0] * (slots - r.verified)] for r in whole], dtype=torch.float64)
    verified_R1, accepted_R1 = torch.tensor([[r.verified, r.accepted] for r in whole]).T[..., None]
    slot_K = torch.arange(slots)
    known_RK = slot_K < verified_R1
    outcome_RK = (slot_K < accepted_R1).double()
    return expected_calibration_error(confidence_RK.cumprod(1)[known_RK], outcome_RK[known_RK], bins)


def _samples(probabilities: list[float], outcomes: list[bool]) -> tuple[Tensor, Tensor]:
    return torch.tensor(probabilities, dtype=torch.float64), torch.tensor(outcomes, dtype=torch.float64)


def _binned(probability_N: Tensor, outcome_N: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(count_b, mean probability_b, accepted share_b); 0 where a bin is empty."""
    p_N, y_N = probability_N.double(), outcome_N.double()
    bin_N = (p_N * bins).long().clamp(0, bins - 1)
    count_b, sum_b, yes_b = (torch.bincount(bin_N, w, bins) for w in (torch.ones_like(p_N), p_N, y_N))
    return count_b, sum_b / count_b.clamp(min=1), yes_b / count_b.clamp(min=1)
