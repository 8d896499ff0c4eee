"""How likely each request's next draft survives, before it exists: from its own rounds, its group's, and everyone's.

R requests of a round, N requests' rounds, K draft slots. Conditional acceptance is P(slot k | slots before).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.ops.calibrated import sigmoid
from dspark.speculation.round import Array, Outcome, Round

FIRST_ACCEPTANCE = 0.7  # conditional, of a drafter nothing is known about
FIRST_WEIGHT = 4.0  # rounds that guess counts for
POOL_MEMORY = 0.995  # of what everyone's rounds said of a slot, per round that reached it
LEAST_SURE = 0.2  # so that a slot that was hardly ever reached moves little
LARGEST = 7.0  # logit of acceptance
OWN_MEMORY = 0.95  # of a request's or a group's, per round of theirs
PRIOR = 12.0  # drafted tokens that the wider circle's odds count for
FORGET_AFTER = 4096  # requests and groups remembered before those not seen lately are dropped


class Acceptance:
    """The odds of acceptance by slot, and by what factor each group's and request's differ.

    Later slots are reached by those who are guessed well, so the odds by slot are those of a request of factor 1, not
    everyone's mean. Slots that a plan cut off are filled in with what their confidences say, so that a plan's choice
    does not censor what is learnt.
    """

    def __init__(self, first: Sequence[float] = ()):
        """`first` is the conditional acceptance by slot to start from, as an offline calibration knows it."""
        self.first = list(first)
        self.logit_K = np.zeros(0)  # of acceptance at factor 1
        self.sure_K = np.zeros(0)  # what the outcomes say about how sure those are, forgetting
        self._groups, self._requests = _Odds(), _Odds()

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Take finished rounds, all at once."""
        outcomes = [outcome for outcome in outcomes if outcome.drafting]
        if not outcomes:
            return
        reached_NK, passed_NK = filled_in(outcomes)
        groups = [group for outcome in outcomes for group in groups_of(outcome.round)]
        requests = [request for outcome in outcomes for request in requests_of(outcome.round)]
        self._follow(reached_NK, passed_NK, self.factors(groups, requests))
        mean_K = self.conditional(passed_NK.shape[1])
        yes_N, expected_N, all_N = passed_NK.sum(1), reached_NK @ mean_K, reached_NK.sum(1)
        row_N3 = np.stack([yes_N, all_N - yes_N, expected_N], 1)
        self._groups.add(groups, row_N3, all_N > 0)
        self._requests.add(requests, row_N3, all_N > 0)

    def conditional(self, slots: int) -> Array:
        """Conditional acceptance by slot of a request of factor 1, [K]."""
        self._grow(slots)
        return sigmoid(self.logit_K[:slots])

    def survival(self, round: Round, slots: int) -> Array:
        """What each request's slots are expected to survive, [R, K]."""
        mean_K = self.conditional(slots)
        odds_K = mean_K / (1 - mean_K)
        odds_RK = self.factors(groups_of(round), requests_of(round))[:, None] * odds_K
        return np.asarray(np.multiply.accumulate(odds_RK / (1 + odds_RK), axis=1))

    def group_factor(self, group: str) -> float:
        """By how much a group's odds of acceptance differ from everyone's."""
        return float(self._groups.factors([group], np.ones(1))[0])

    def factors(self, groups: Sequence[str], requests: Sequence[int]) -> Array:
        """By how much each request's odds of acceptance differ from everyone's, [R]."""
        return self._requests.factors(requests, self._groups.factors(groups, np.ones(len(groups))))

    def _follow(self, reached_NK: Array, passed_NK: Array, factor_N: Array) -> None:
        """Move the odds by slot towards what the rounds say of them, given the factors: one Newton step."""
        slots = passed_NK.shape[1]
        self._grow(slots)
        p_NK = sigmoid(self.logit_K[:slots] + np.log(factor_N)[:, None])
        # by slot: one that is seldom drafted is not forgotten over the rounds of others
        self.sure_K[:slots] *= POOL_MEMORY ** reached_NK.sum(0)
        self.sure_K[:slots] += (reached_NK * p_NK * (1 - p_NK)).sum(0)
        move_K = (passed_NK - reached_NK * p_NK).sum(0) / (self.sure_K[:slots] + LEAST_SURE)
        self.logit_K[:slots] += np.minimum(np.maximum(move_K, -1.0), 1.0)
        np.minimum(np.maximum(self.logit_K, -LARGEST), LARGEST, out=self.logit_K)

    def _grow(self, slots: int) -> None:
        while len(self.logit_K) < slots:
            known = [*self.first, self.first[-1] if self.first else FIRST_ACCEPTANCE]
            mean = min(max(known[min(len(self.logit_K), len(known) - 1)], 1e-4), 1 - 1e-4)
            self.logit_K = np.append(self.logit_K, math.log(mean / (1 - mean)))
            self.sure_K = np.append(self.sure_K, FIRST_WEIGHT * mean * (1 - mean))


class _Odds:
    """Accepted and rejected tokens of circles of requests, forgetting, beside what everyone's rate predicts.

    C circles; row 0 stands for those nothing is known of.
    """

    def __init__(self) -> None:
        self._row: dict[object, int] = {}
        self._count_C3 = np.zeros((1, 3))  # accepted, rejected, expected
        self._heard_C = np.zeros(1, dtype=np.int64)  # when last
        self._clock = 0

    def add(self, circles: Sequence[object], round_N3: Array, counts_N: NDArray[np.bool_]) -> None:
        """Rounds in their order, each of its circle, where it `counts`: a round forgets a share of those before it."""
        row_N = np.array(list(map(self._row_of, circles)))[counts_N]
        order_N = np.argsort(row_N, kind="stable")
        row_N, round_N3 = row_N[order_N], round_N3[counts_N][order_N]
        if not len(row_N):
            return
        first_N = np.flatnonzero(np.append(True, row_N[1:] != row_N[:-1]))  # of each circle
        rounds_N = np.diff(np.append(first_N, len(row_N)))
        later_N = np.repeat(first_N + rounds_N, rounds_N) - 1 - np.arange(len(row_N))
        fresh_N3 = np.add.reduceat(round_N3 * (OWN_MEMORY**later_N)[:, None], first_N, axis=0)
        row_N = row_N[first_N]
        self._count_C3[row_N] = self._count_C3[row_N] * (OWN_MEMORY**rounds_N)[:, None] + fresh_N3
        self._clock += 1
        self._heard_C[row_N] = self._clock
        if len(self._row) > FORGET_AFTER:
            self._forget()

    def factors(self, circles: Sequence[object], wider_R: Array) -> Array:
        """Their odds over everyone's, drawn towards the wider circle's."""
        row = self._row
        yes_R, no_R, expected_R = self._count_C3[[row.get(circle, 0) for circle in circles]].T
        mean_R = expected_R / np.maximum(yes_R + no_R, 1e-9)
        mean_R[yes_R + no_R == 0.0] = 0.5
        mean_R = np.minimum(np.maximum(mean_R, 1e-4), 1 - 1e-4)
        odds_R = mean_R / (1 - mean_R)
        prior_R = wider_R * odds_R / (1 + wider_R * odds_R)
        return np.asarray((yes_R + PRIOR * prior_R) / (no_R + PRIOR * (1 - prior_R)) / odds_R)

    def _row_of(self, circle: object) -> int:
        row = self._row.get(circle)
        if row is None:
            row = self._row[circle] = 1 + len(self._row)
            if row == len(self._count_C3):
                self._count_C3 = np.concatenate([self._count_C3, np.zeros_like(self._count_C3)])
                self._heard_C = np.concatenate([self._heard_C, np.zeros_like(self._heard_C)])
        return row

    def _forget(self) -> None:
        """Drop all but those heard of last."""
        kept = sorted(self._row, key=lambda circle: -self._heard_C[self._row[circle]])[: FORGET_AFTER // 2]
        row_C = np.array([0, *(self._row[circle] for circle in kept)])
        self._count_C3, self._heard_C = self._count_C3[row_C], self._heard_C[row_C]
        self._row = {circle: 1 + place for place, circle in enumerate(kept)}


def filled_in(outcomes: Sequence[Outcome]) -> tuple[Array, Array]:
    """How far each slot of each request was reached and passed, [N, K]: 0 or 1 where the target said, else expected."""
    slots = max(max(o.round.limit_R) if o.survival_RK is None else o.survival_RK.shape[1] for o in outcomes)
    a_NK = np.zeros((sum(outcome.round.requests for outcome in outcomes), slots))
    row = 0
    for outcome in outcomes:
        if outcome.survival_RK is not None:  # else all was verified, and the target has said everything
            a_NK[row : row + outcome.round.requests, : outcome.survival_RK.shape[1]] = outcome.survival_RK
        row += outcome.round.requests
    rows = [np.array([o.plan, o.accepted_R, o.round.limit_R]) for o in outcomes]
    plan_N1, accepted_N1, limit_N1 = np.concatenate(rows, axis=1)[:, :, None]
    slot_K = np.arange(slots)
    drafted_NK = slot_K < limit_N1
    before_N1 = np.take_along_axis(a_NK, np.maximum(plan_N1 - 1, 0), 1)
    beyond_NK = a_NK / np.where(plan_N1 > 0, np.maximum(before_N1, 1e-9), 1.0) * (accepted_N1 == plan_N1)
    passed_NK = np.where(slot_K < plan_N1, slot_K < accepted_N1, np.minimum(beyond_NK, 1.0)) * drafted_NK
    reached_NK = np.concatenate([np.ones((len(a_NK), 1)), passed_NK[:, :-1]], 1) * drafted_NK
    return reached_NK, passed_NK


def groups_of(round: Round) -> list[str]:
    """The group of each request."""
    return [params.speculation_group for params in round.params_R] or [""] * round.requests


def requests_of(round: Round) -> Sequence[int]:
    """The number of each request; where there are none, ones that no request has."""
    return round.request_ids or range(-round.requests, 0)
