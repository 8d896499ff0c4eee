"""How likely each request's next draft survives, before it exists: from its own rounds, its group's, and everyone's.

R requests of a round, N requests' rounds, K draft slots. Conditional acceptance is P(slot k | slots before).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.speculation.round import Array, Outcome, Round

FIRST_ACCEPTANCE = 0.7  # conditional, of a drafter nothing is known about
FIRST_WEIGHT = 4.0  # rounds that guess counts for
POOL_MEMORY = 0.995  # of everyone's counts, per request and round
OWN_MEMORY = 0.95  # of a request's or a group's, per round of theirs
PRIOR = 12.0  # drafted tokens that the wider circle's odds count for
FORGET_AFTER = 4096  # requests and groups remembered before those not seen lately are dropped


class Acceptance:
    """Conditional acceptance by slot over all requests, and by what factor each group's and request's odds differ.

    Slots that a plan cut off are filled in with what their confidences say, so that a plan's choice does not censor
    what is learnt.
    """

    def __init__(self, first: Sequence[float] = ()):
        """`first` is the conditional acceptance by slot to start from, as an offline calibration knows it."""
        self.first = list(first)
        self.reached_K = np.zeros(0)
        self.passed_K = np.zeros(0)
        self._circles: dict[object, _Odds] = {}

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Take finished rounds, all at once."""
        outcomes = [outcome for outcome in outcomes if outcome.survival_RK is not None]
        if not outcomes:
            return
        reached_NK, passed_NK = filled_in(outcomes)
        slots = passed_NK.shape[1]
        self._grow(slots)
        memory = POOL_MEMORY ** int(reached_NK[:, 0].sum())
        self.reached_K *= memory
        self.passed_K *= memory
        self.reached_K[:slots] += reached_NK.sum(0)
        self.passed_K[:slots] += passed_NK.sum(0)
        yes_N, expected_N, all_N = passed_NK.sum(1), reached_NK @ self.conditional(slots), reached_NK.sum(1)
        rows = np.stack([yes_N, all_N - yes_N, expected_N], 1).tolist()
        whose_N = [circle for outcome in outcomes for circle in circles(outcome.round)]
        for (group, request), row in zip(whose_N, rows, strict=True):
            if row[0] + row[1]:
                for circle in (group, request):
                    odds = self._circles.pop(circle, None) or _Odds()  # the order is that of the last round
                    odds.add(*row)
                    self._circles[circle] = odds
        while len(self._circles) > FORGET_AFTER:
            del self._circles[next(iter(self._circles))]

    def conditional(self, slots: int) -> Array:
        """Everyone's conditional acceptance by slot, [K]."""
        self._grow(slots)
        return np.clip(self.passed_K[:slots] / self.reached_K[:slots], 1e-4, 1 - 1e-4)

    def survival(self, round: Round, slots: int) -> Array:
        """What each request's slots are expected to survive, [R, K]."""
        mean_K = self.conditional(slots)
        odds_K = mean_K / (1 - mean_K)
        factor_R = np.array([self.factor(*circle) for circle in circles(round)])
        odds_RK = factor_R[:, None] * odds_K
        return np.asarray(np.cumprod(odds_RK / (1 + odds_RK), axis=1), dtype=np.float64)

    def factor(self, group: object, request: object) -> float:
        """By how much a request's odds of acceptance differ from everyone's."""
        wider = self._circles[group].factor(1.0) if group in self._circles else 1.0
        return self._circles[request].factor(wider) if request in self._circles else wider

    def _grow(self, slots: int) -> None:
        while len(self.reached_K) < slots:
            known = [*self.first, self.first[-1] if self.first else FIRST_ACCEPTANCE]
            mean = known[min(len(self.reached_K), len(known) - 1)]
            self.reached_K = np.append(self.reached_K, FIRST_WEIGHT)
            self.passed_K = np.append(self.passed_K, FIRST_WEIGHT * mean)


class _Odds:
    """Accepted and rejected tokens of one circle of requests, forgetting, beside what everyone's rate predicts."""

    __slots__ = ("expected", "no", "yes")

    def __init__(self) -> None:
        self.yes = self.no = self.expected = 0.0

    def add(self, yes: float, no: float, expected: float) -> None:
        """One round."""
        self.yes = OWN_MEMORY * self.yes + yes
        self.no = OWN_MEMORY * self.no + no
        self.expected = OWN_MEMORY * self.expected + expected

    def factor(self, wider: float) -> float:
        """Its odds over everyone's, drawn towards the wider circle's."""
        total = self.yes + self.no
        mean = min(max(self.expected / total, 1e-4), 1 - 1e-4) if total else 0.5
        odds = mean / (1 - mean)
        prior = wider * odds / (1 + wider * odds)
        return (self.yes + PRIOR * prior) / (self.no + PRIOR * (1 - prior)) / odds


def filled_in(outcomes: Sequence[Outcome]) -> tuple[Array, Array]:
    """How far each slot of each request was reached and passed, [N, K]: 0 or 1 where the target said, else expected."""
    slots = max(outcome.survival_RK.shape[1] for outcome in outcomes if outcome.survival_RK is not None)
    a_NK = np.zeros((sum(outcome.round.requests for outcome in outcomes), slots))
    row = 0
    for outcome in outcomes:
        assert outcome.survival_RK is not None
        requests, width = outcome.survival_RK.shape
        a_NK[row : row + requests, :width] = outcome.survival_RK
        row += requests
    rows = [np.array([o.plan, o.accepted_R, o.round.limit_R]) for o in outcomes]
    plan_N1, accepted_N1, limit_N1 = np.concatenate(rows, axis=1)[:, :, None]
    slot_K = np.arange(slots)
    drafted_NK = slot_K < limit_N1
    before_N1 = np.take_along_axis(a_NK, np.maximum(plan_N1 - 1, 0), 1)
    beyond_NK = a_NK / np.where(plan_N1 > 0, np.maximum(before_N1, 1e-9), 1.0) * (accepted_N1 == plan_N1)
    passed_NK = np.where(slot_K < plan_N1, slot_K < accepted_N1, np.minimum(beyond_NK, 1.0)) * drafted_NK
    reached_NK = np.concatenate([np.ones((len(a_NK), 1)), passed_NK[:, :-1]], 1) * drafted_NK
    return reached_NK, passed_NK


def circles(round: Round) -> list[tuple[object, object]]:
    """(group, request) of each request; groups are names, requests numbers, so they never meet."""
    if not round.request_ids:
        return [("", -1 - r) for r in range(round.requests)]
    return [
        (params.speculation_group, request) for params, request in zip(round.params_R, round.request_ids, strict=True)
    ]
