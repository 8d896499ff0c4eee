"""How likely each request's next draft survives, before it exists: from its own rounds, its circle's, and its kind's.

R requests of a round, N requests' rounds, K draft slots. Conditional acceptance is P(slot k | slots before).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dspark.ops.calibrated import sigmoid
from dspark.speculation.circles import NOBODYS, Circle, Kind, circles_of, names_of
from dspark.speculation.finished import Finished
from dspark.speculation.odds import Odds
from dspark.speculation.round import Array, Round

FIRST_ACCEPTANCE = 0.7  # conditional, of a drafter nothing is known about
FIRST_WEIGHT = 4.0  # rounds that guess counts for
CALIBRATED_WEIGHT = 12.0  # ... and that of a calibration
MEMORY = 0.995  # of what the rounds of a kind said of a slot, per round that reached it
LEAST_SURE = 0.2  # so that a slot that was hardly ever reached moves little
LARGEST = 7.0  # logit of acceptance
CIRCLES = 1024  # with odds of their own; the requests of more groups go by their kind's

First = Callable[[Kind], Sequence[float]]
"""The conditional acceptance by slot that a kind of request starts from; () where nothing is known."""


class Acceptance:
    """The odds of acceptance by circle and slot, and by what factor each request's differ.

    At temperature 0 drafts are accepted far more often than at 1, so what one kind teaches tells nothing of another; a
    group starts from what all rounds of its kind say, and goes by its own. Later slots are reached by those who are
    guessed well, so the odds by slot are those of a request of factor 1, not everyone's mean. Slots that a plan cut off
    are filled in with what their confidences say, so that a plan's choice does not censor what is learnt.
    """

    def __init__(self, first: First | None = None):
        self.first: First = first or (lambda kind: ())
        self._kinds: dict[Kind, _Slots] = {}
        self._circles: dict[Circle, _Slots] = {}
        self._requests = Odds()

    def learn(self, finished: Finished) -> None:
        """Take finished rounds, all at once."""
        if not len(finished):
            return
        reached_NK, passed_NK = finished.filled_in()
        slots, expected_N = passed_NK.shape[1], np.zeros(len(finished))
        factor_N = self.factors(finished.request)
        kinds: dict[Kind, list[int]] = {}
        for circle, rows in _rows_of(finished.circle).items():
            table = self._circle(circle)
            table.follow(reached_NK[rows], passed_NK[rows], factor_N[rows])
            expected_N[rows] = reached_NK[rows] @ table.mean(slots)
            kinds.setdefault(circle.kind, []).extend(rows)
        for kind, rows in kinds.items():
            self._kind(kind).follow(reached_NK[rows], passed_NK[rows], factor_N[rows])
        yes_N, all_N = passed_NK.sum(1), reached_NK.sum(1)
        self._requests.add(finished.request, np.stack([yes_N, all_N - yes_N, expected_N], 1), all_N > 0)

    def conditional(self, slots: int, circle: Circle = NOBODYS) -> Array:
        """Conditional acceptance by slot of a request of this circle and of factor 1, [K]."""
        return self._circle(circle).mean(slots)

    def survival(self, round: Round, slots: int) -> Array:
        """What each request's slots are expected to survive, [R, K]."""
        circles = circles_of(round)
        mean = {circle: self.conditional(slots, circle) for circle in dict.fromkeys(circles)}
        factor_R = self.factors(names_of(round))
        return _survival(np.array([mean[circle] for circle in circles]), factor_R[:, None])

    def newcomers(self, circle: Circle, slots: int) -> Array:
        """The same of a request of this circle that has not drafted yet, [K]."""
        return _survival(self.conditional(slots, circle), 1.0)

    def factors(self, requests: Sequence[int]) -> Array:
        """By how much each request's odds of acceptance differ from its circle's, [R]."""
        return self._requests.factors(requests)

    def _kind(self, kind: Kind) -> _Slots:
        if kind not in self._kinds:
            first = self.first(kind)
            self._kinds[kind] = _Slots(first or [FIRST_ACCEPTANCE], CALIBRATED_WEIGHT if first else FIRST_WEIGHT)
        return self._kinds[kind]

    def _circle(self, circle: Circle) -> _Slots:
        if circle not in self._circles:
            kind = self._kind(circle.kind)
            if len(self._circles) >= CIRCLES:
                return kind
            self._circles[circle] = _Slots(kind.mean(kind.known).tolist(), kind.weight)
        return self._circles[circle]


class _Slots:
    """The logit of conditional acceptance by slot of one circle or kind, of a request of factor 1."""

    def __init__(self, first: Sequence[float], weight: float):
        """`first` is the guess, which counts for `weight` rounds; the last slot's goes on."""
        self.weight, self._first = weight, list(first)
        self._logit_K = np.zeros(0)
        self._sure_K = np.zeros(0)  # what the outcomes say about how sure those are, forgetting

    @property
    def known(self) -> int:
        """Slots that there is a guess for, or more."""
        return max(len(self._first), len(self._logit_K))

    def mean(self, slots: int) -> Array:
        """[K]."""
        self._grow(slots)
        return sigmoid(self._logit_K[:slots])

    def follow(self, reached_NK: Array, passed_NK: Array, factor_N: Array) -> None:
        """Move towards what the rounds say, given the requests' factors: one Newton step."""
        slots = passed_NK.shape[1]
        self._grow(slots)
        logit_K, sure_K = self._logit_K[:slots], self._sure_K[:slots]
        p_NK = sigmoid(logit_K + np.log(factor_N)[:, None])
        # by slot: one that is seldom drafted is not forgotten over the rounds of others
        sure_K *= MEMORY ** reached_NK.sum(0)
        sure_K += (reached_NK * p_NK * (1 - p_NK)).sum(0)
        move_K = (passed_NK - reached_NK * p_NK).sum(0) / (sure_K + LEAST_SURE)
        logit_K += np.minimum(np.maximum(move_K, -1.0), 1.0)
        np.minimum(np.maximum(logit_K, -LARGEST), LARGEST, out=logit_K)

    def _grow(self, slots: int) -> None:
        while len(self._logit_K) < slots:
            mean = min(max(self._first[min(len(self._logit_K), len(self._first) - 1)], 1e-4), 1 - 1e-4)
            self._logit_K = np.append(self._logit_K, math.log(mean / (1 - mean)))
            self._sure_K = np.append(self._sure_K, self.weight * mean * (1 - mean))


def _rows_of(circles: Sequence[Circle]) -> dict[Circle, list[int]]:
    """Where each circle stands."""
    rows: dict[Circle, list[int]] = {}
    for row, circle in enumerate(circles):
        rows.setdefault(circle, []).append(row)
    return rows


def _survival(mean_RK: Array, factor_R1: Array | float) -> Array:
    odds_RK = factor_R1 * mean_RK / (1 - mean_RK)
    return np.asarray(np.multiply.accumulate(odds_RK / (1 + odds_RK), axis=-1))
