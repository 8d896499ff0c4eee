"""Planners that weigh each drafted token's chance against what one more row costs the step. (DSpark, alg. 1, §5.2)

R requests, K draft slots, N candidates (request, slot) in the order of admission, J slots from the present one on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark.speculation.guard import Guard
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Outcome, Round, as_array

LAG = 2  # steps between the confidences that give the budget and the step that spends it (DSpark, §5.2)
MEMORY = 0.98  # of the running means, per round
FIRST_MEAN = 0.7  # of a confidence, before any was seen


class Candidates(NamedTuple):
    """All drafted slots, best first; ties by slot, then request, never by anything a token decides."""

    request_N: NDArray[np.intp]
    survival_N: Array


def candidates(survival_RK: Array, limit_R: Sequence[int]) -> Candidates:
    """The drafted slots of a round by falling survival. A request's slots stay in order: survival never rises."""
    requests, slots = survival_RK.shape
    drafted_KR = np.arange(slots)[:, None] < np.asarray(limit_R)
    flat = np.where(drafted_KR, survival_RK.T, -1.0).ravel()
    order_N = np.argsort(-flat, kind="stable")[: int(drafted_KR.sum())]
    return Candidates(order_N % requests, flat[order_N])


def throughput(survival_N: Array, seconds_N1: Array, requests: int) -> Array:
    """Θ after n admissions, n = 0..N: expected tokens of the step over its seconds. (DSpark, §5.2)"""
    tokens_N1 = np.empty(len(survival_N) + 1)
    tokens_N1[0] = requests
    np.cumsum(survival_N, out=tokens_N1[1:])
    tokens_N1[1:] += requests
    return tokens_N1 / seconds_N1


class Priced:
    """What these planners share: all that the guard allows is drafted, and a step is priced with its draft."""

    def __init__(self, prices: Prices):
        self.prices = prices
        self.guard = Guard()
        self._forbidden = 0  # requests of the last step for which the guard allowed no draft, else 0

    def slots(self, round: Round) -> list[int]:
        """As many as fit, or none: these planners decide after drafting."""
        allowed = self.guard.allows(round.requests)
        self._forbidden = 0 if allowed else round.requests
        return list(round.limit_R) if allowed else [0] * round.requests

    @property
    def rest(self) -> int:
        """Steps for which nobody drafting holds, while there are as many requests."""
        return self.guard.rest(self._forbidden) if self._forbidden else 0

    def observe(self, outcome: Outcome) -> None:
        """Hold the step against its price."""
        self.guard.observe(outcome, self.prices)

    def seconds(self, round: Round, most: int) -> Array:
        """Seconds of the step with 0..`most` drafted tokens verified."""
        asked = round.asked_R or round.limit_R
        drafting = sum(1 for slots in asked if slots)
        return self.prices.verifying(round, most) + self.prices.drafting(round, max(asked, default=0), drafting)


class Greedy(Priced):
    """Algorithm 1 as printed: admit by falling survival, stop at the first admission that does not raise Θ.

    Each decision reads the survival of a slot whose predecessors are admitted, so no token decides about itself.
    """

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The plan of algorithm 1."""
        if survival_RK is None:
            return [0] * round.requests
        found = candidates(as_array(survival_RK), round.limit_R)
        theta_N1 = throughput(found.survival_N, self.seconds(round, len(found.survival_N)), round.requests)
        no_better = theta_N1[1:] <= theta_N1[:-1]
        stop = int(no_better.argmax()) if no_better.any() else len(no_better)
        return _lengths(found.request_N[:stop], round.requests)


class Lagged(Priced):
    """A budget from the unconstrained argmax over confidences two steps old, spent by present survival. (DSpark, §5.2)

    The budget is older than the round, so it may look past any cliff of the step cost. Until one is old enough,
    everything is verified.
    """

    def __init__(self, prices: Prices, lag: int = LAG):
        super().__init__(prices)
        self.budgets: deque[int] = deque(maxlen=lag)
        self.lag = lag

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The best of the present candidates, as many as the budget."""
        if survival_RK is None:
            return [0] * round.requests
        found = candidates(as_array(survival_RK), round.limit_R)
        theta_N1 = throughput(found.survival_N, self.seconds(round, len(found.survival_N)), round.requests)
        budget = self.budgets[0] if len(self.budgets) == self.lag else len(found.request_N)
        self.budgets.append(int(theta_N1.argmax()))
        return _lengths(found.request_N[:budget], round.requests)


class Lookahead(Priced):
    """Decides slot by slot over all requests, weighing what lies beyond by its expectation.

    Slot k's survival is known once slots before it are decided; later slots stand in with survival times the running
    means of their confidences. The best set of rows may then lie past a cliff of the step cost, and still no decision
    reads anything that a token not yet decided about has touched.
    """

    def __init__(self, prices: Prices):
        super().__init__(prices)
        self.means = RunningMeans()

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The plan of a walk over the slots."""
        if survival_RK is None:
            return [0] * round.requests
        a_RK = as_array(survival_RK)
        asked_R = round.asked_R or round.limit_R
        seconds_N1 = self.seconds(round, sum(asked_R))

        def score(gain_N1: Array, admitted: int) -> Array:
            return (round.requests + gain_N1) / seconds_N1[admitted : admitted + len(gain_N1)]

        return walk(a_RK, round.limit_R, asked_R, self.means.ahead(a_RK.shape[1]), score)

    def observe(self, outcome: Outcome) -> None:
        """Take the round's confidences into the running means."""
        super().observe(outcome)
        if outcome.survival_RK is not None:
            self.means.observe(outcome.survival_RK, outcome.round.limit_R)


class RunningMeans:
    """Mean confidence at each slot, given that the slots before were accepted, over earlier rounds."""

    def __init__(self) -> None:
        self.reached_K = np.zeros(0)  # Σ of survival up to slot k - 1, and to slot k, forgetting
        self.passed_K = np.zeros(0)
        self._ahead_KK: Array | None = None

    def observe(self, survival_RK: Array, limit_R: Sequence[int], rounds: int = 1) -> None:
        """Survival weighs the confidences as acceptance would, without waiting for outcomes that a plan may censor.

        The rows may be those of several `rounds`.
        """
        slots, self._ahead_KK = survival_RK.shape[1], None
        if len(self.reached_K) < slots:
            more = slots - len(self.reached_K)
            self.reached_K = np.append(self.reached_K, np.ones(more))
            self.passed_K = np.append(self.passed_K, np.full(more, FIRST_MEAN))
        drafted_RK = np.arange(slots) < np.asarray(limit_R)[:, None]
        passed_RK = survival_RK * drafted_RK
        reached_K = passed_RK[:, :-1].copy()
        reached_K *= drafted_RK[:, 1:]
        self.reached_K *= MEMORY**rounds
        self.passed_K *= MEMORY**rounds
        self.reached_K[0] += drafted_RK[:, 0].sum()
        self.reached_K[1:slots] += reached_K.sum(0)
        self.passed_K[:slots] += passed_RK.sum(0)

    def ahead(self, slots: int) -> Array:
        """[K, K]: entry (k, j) is the expected survival of slot j over that of slot k; 0 where j < k."""
        if self._ahead_KK is not None and len(self._ahead_KK) == slots:
            return self._ahead_KK
        mean_K = np.full(slots, FIRST_MEAN)
        known = min(slots, len(self.reached_K))
        mean_K[:known] = self.passed_K[:known] / np.maximum(self.reached_K[:known], 1e-9)
        ahead_KK = np.zeros((slots, slots))
        for k in range(slots):
            ahead_KK[k, k] = 1.0
            np.cumprod(np.minimum(mean_K[k + 1 :], 1.0), out=ahead_KK[k, k + 1 :])
        self._ahead_KK = ahead_KK
        return ahead_KK


Score = Callable[[Array, int], Array]
"""(gain of the first n candidates from here on, n = 0..N, admitted before them) -> what the step is then worth."""


def walk(value_RK: Array, limit_R: Sequence[int], asked_R: Sequence[int], ahead_KK: Array, score: Score) -> list[int]:
    """Admit slot by slot, for as long as the best set that holds the present slots is worth more than stopping.

    `value_RK` is survival (times what the request's tokens are worth). At slot k it is read only for requests whose
    slots before k are admitted. How many slots a drafter that stops early has drafted tells about their tokens, so
    what lies beyond reaches to the slots that were asked for.
    """
    requests, slots = value_RK.shape
    limit, asked = np.asarray(limit_R), np.asarray(asked_R)
    length_R = np.zeros(requests, dtype=np.int64)
    alive_A = np.arange(requests)
    least, everywhere = min(limit_R), min(asked_R) == slots
    gain, admitted = 0.0, 0
    for k in range(slots):
        if least <= k:
            alive_A = alive_A[limit[alive_A] > k]
        if not len(alive_A):
            break
        now_A = value_RK[alive_A, k]
        beyond_AJ = now_A[:, None] * ahead_KK[k, k:]
        if not everywhere:
            beyond_AJ = beyond_AJ[np.arange(k, slots) < asked[alive_A, None]]
        sorted_N = np.sort(beyond_AJ, axis=None)[::-1]
        gain_N1 = np.empty(len(sorted_N) + 1)
        gain_N1[0] = gain
        np.cumsum(sorted_N, out=gain_N1[1:])
        gain_N1[1:] += gain
        best = int(score(gain_N1, admitted).argmax())
        if not best:
            break
        alive_A = _best_of(alive_A, now_A, sorted_N, best)
        length_R[alive_A] = k + 1
        gain += float(value_RK[alive_A, k].sum())
        admitted += len(alive_A)
    return length_R.tolist()


def _best_of(alive_A: NDArray[np.intp], now_A: Array, sorted_N: Array, best: int) -> NDArray[np.intp]:
    """The requests whose present slot is among the `best` largest values; ties go to the present slots, in order."""
    bound = sorted_N[best - 1]
    above = int(np.count_nonzero(sorted_N[:best] > bound))
    tied = now_A == bound
    if int(tied.sum()) > best - above:
        tied &= np.cumsum(tied) <= best - above
    return alive_A[(now_A > bound) | tied]


def _lengths(request_N: NDArray[np.intp], requests: int) -> list[int]:
    return np.bincount(request_N, minlength=requests).tolist()
