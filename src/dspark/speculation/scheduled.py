"""Planners that weigh each drafted token's chance against what one more row costs the step. (DSpark, alg. 1, §5.2)

R requests, K draft slots, N candidates (request, slot) in the order of admission.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.ops.walk import walk
from dspark.speculation.guard import Guard
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Outcome, Round, as_array

LAG = 2  # steps between the confidences that give the budget and the step that spends it (DSpark, §5.2)
MEMORY = 0.98  # of the running means, per round
FEW, HEARD = 8, 256  # requests whose rounds are learnt from at once; of more, this many rounds together
FIRST_MEAN = 0.7  # of a confidence, before any was seen


class Candidates:
    """All drafted slots of a round, best first; ties by slot, then request, never by anything a token decides.

    A request's slots stay in order, for survival never rises.
    """

    def __init__(self, survival_RK: Array, limit_R: Sequence[int]):
        if min(limit_R) < survival_RK.shape[1]:
            undrafted_RK = np.arange(survival_RK.shape[1]) >= np.asarray(limit_R)[:, None]
            survival_RK = np.where(undrafted_RK, -1.0, survival_RK)
        self.survival_RK = survival_RK
        self.falling_N = np.sort(survival_RK, axis=None)[::-1][: sum(limit_R)]

    def __len__(self) -> int:
        return len(self.falling_N)

    def best(self, count: int) -> list[int]:
        """How many of each request's slots are among the `count` best."""
        if not count:
            return [0] * len(self.survival_RK)
        bound = self.falling_N[count - 1]
        chosen_RK = self.survival_RK >= bound
        spare = int(np.count_nonzero(chosen_RK)) - count
        if spare:  # the last of those that are just as good
            tied_N = np.flatnonzero(bound == self.survival_RK.T)[-spare:]
            chosen_RK.T.flat[tied_N] = False
        return chosen_RK.sum(1).tolist()


def throughput(survival_N: Array, seconds_N1: Array, requests: int) -> Array:
    """Θ after n admissions, n = 0..N: expected tokens of the step over its seconds. (DSpark, §5.2)"""
    tokens_N1 = np.full(len(survival_N) + 1, float(requests))
    tokens_N1[1:] += np.add.accumulate(survival_N)
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
        drafting = len(asked) - asked.count(0)
        return self.prices.verifying(round, most) + self.prices.drafting(round, max(asked, default=0), drafting)


class Greedy(Priced):
    """Algorithm 1 as printed: admit by falling survival, stop at the first admission that does not raise Θ.

    Each decision reads the survival of a slot whose predecessors are admitted, so no token decides about itself.
    """

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The plan of algorithm 1."""
        if survival_RK is None:
            return [0] * round.requests
        found = Candidates(as_array(survival_RK), round.limit_R)
        theta_N1 = throughput(found.falling_N, self.seconds(round, len(found)), round.requests)
        no_better = np.append(theta_N1[1:] <= theta_N1[:-1], True)
        return found.best(int(no_better.argmax()))


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
        found = Candidates(as_array(survival_RK), round.limit_R)
        theta_N1 = throughput(found.falling_N, self.seconds(round, len(found)), round.requests)
        budget = self.budgets[0] if len(self.budgets) == self.lag else len(found)
        self.budgets.append(int(theta_N1.argmax()))
        return found.best(min(budget, len(found)))


class Lookahead(Priced):
    """Decides slot by slot over all requests, weighing what lies beyond by its expectation.

    Slot k's survival is known once slots before it are decided; later slots stand in with survival times the running
    means of their confidences. The best set of rows may then lie past a cliff of the step cost, and still no decision
    reads anything that a token not yet decided about has touched.
    """

    def __init__(self, prices: Prices):
        super().__init__(prices)
        self.means = RunningMeans()
        self._heard: list[Outcome] = []

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The plan of a walk over the slots."""
        if survival_RK is None:
            return [0] * round.requests
        a_RK = as_array(survival_RK)
        asked_R = round.asked_R or round.limit_R
        seconds_N1, ahead_KK = self.seconds(round, sum(asked_R)), self.means.ahead(a_RK.shape[1])
        return walk(a_RK, round.limit_R, asked_R, ahead_KK, seconds_N1, committed=round.requests)

    def observe(self, outcome: Outcome) -> None:
        """Take the round's confidences into the running means; rounds of many requests several at a time."""
        super().observe(outcome)
        if outcome.survival_RK is None:
            return
        self._heard.append(outcome)
        if len(self._heard) * outcome.round.requests >= HEARD or outcome.round.requests <= FEW:
            self.means.observe(*widest(self._heard))
            self._heard = []


def widest(outcomes: Sequence[Outcome]) -> tuple[Array, list[int], int]:
    """Survival [N, K] and drafted slots of the outcomes with the most slots, one below the other; how many they are."""
    found = [(o.survival_RK, o.round.limit_R) for o in outcomes if o.survival_RK is not None]
    slots = max(a_RK.shape[1] for a_RK, _ in found)
    found = [(a_RK, limit_R) for a_RK, limit_R in found if a_RK.shape[1] == slots]
    return np.concatenate([a_RK for a_RK, _ in found]), [n for _, limit_R in found for n in limit_R], len(found)


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
        reaching_RK = survival_RK[:, :-1]
        if min(limit_R) < slots:
            drafted_RK = np.arange(slots) < np.asarray(limit_R)[:, None]
            survival_RK, reaching_RK = survival_RK * drafted_RK, reaching_RK * drafted_RK[:, 1:]
        self.reached_K *= MEMORY**rounds
        self.passed_K *= MEMORY**rounds
        self.reached_K[0] += len(limit_R) - limit_R.count(0)
        self.reached_K[1:slots] += reaching_RK.sum(0)
        self.passed_K[:slots] += survival_RK.sum(0)

    def ahead(self, slots: int) -> Array:
        """[K, K]: entry (k, j) is the expected survival of slot j over that of slot k; 0 where j < k."""
        if self._ahead_KK is not None and len(self._ahead_KK) == slots:
            return self._ahead_KK
        mean_K = np.full(slots, FIRST_MEAN)
        known = min(slots, len(self.reached_K))
        mean_K[:known] = self.passed_K[:known] / np.maximum(self.reached_K[:known], 1e-9)
        later_KK, upper_KK = _triangles(slots)
        factor_KK = np.where(later_KK, np.minimum(mean_K, 1.0), 1.0)
        self._ahead_KK = np.multiply.accumulate(factor_KK, axis=1) * upper_KK
        return self._ahead_KK


@functools.cache
def _triangles(slots: int) -> tuple[NDArray[np.bool_], Array]:
    """Where j > k, and 1 where j >= k: [K, K]."""
    return np.tri(slots, k=-1, dtype=bool).T, np.tri(slots).T
