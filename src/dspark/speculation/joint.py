"""The joint planner: who drafts, how many slots, and how many of them are verified, under one price of time.

R requests, K draft slots, M = 0..R requests that draft, N drafted tokens verified.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark.speculation.acceptance import Acceptance
from dspark.speculation.ending import worth_drafting
from dspark.speculation.guard import Guard
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Outcome, Round, as_array
from dspark.speculation.scheduled import Priced, RunningMeans, walk
from dspark.speculation.worth import Worth

KEEP = 8  # steps between two decisions about who drafts, while the requests stay the same
REST = 32  # ... while nobody drafts, so that there is nothing new to weigh
EXPLORE = 0.01  # share of the time that may go into drafts that are not expected to pay
STALE = 16  # rounds without a draft after which a request may be tried again
OPTION_MEMORY = 0.98


class Joint(Priced):
    """Maximises expected tokens less the price of time. The price is the best rate that any choice here reaches.

    Before drafting: for every number of slots, the requests in the order of what their drafts are expected to bring;
    the best (slots, requests) of all, drafting nothing included. After drafting: a walk over the slots as in
    `Lookahead`. A round's expectation adds what such a choice was worth in earlier rounds beyond verifying everything.
    """

    def __init__(self, prices: Prices, first: Acceptance | None = None):
        super().__init__(prices)
        self.acceptance = first or Acceptance()
        self.means = RunningMeans()
        self.worth = Worth()
        self.guard = Guard()
        self.rate = 0.0  # tokens (by worth) per second of the present choice: the price of a second
        self._heard: list[Outcome] = []
        self._choice: list[int] = []  # slots by request of the last decision
        self._kept: list[int] = []  # the same, with those that are tried
        self._rate_MK = np.zeros((1, 1))
        self._for: tuple[object, object] = (None, None)
        self._left = 0
        self._allowance = 0.0  # s that exploring may cost by now
        self._undrafted: dict[int, int] = {}  # decisions since a request last drafted
        self._option_K: dict[int, float] = {}  # by slots, tokens a drafting request gains by choosing after drafting
        self._stop_K: list[float] = []

    def slots(self, round: Round) -> list[int]:
        """Slots by request, decided anew every few steps and whenever the requests change."""
        if self._for != (round.request_ids, round.prefill_rows > 0) or not round.request_ids:
            self._decide(round)
        elif self._left <= 0:
            self._again(round)
        self._left -= 1
        return [min(pair) for pair in zip(self._kept, round.limit_R, strict=True)]

    @property
    def rest(self) -> int:
        """Steps for which nobody drafting holds, while the requests are the same; 0 where a step's speed matters."""
        return 0 if self.worth.floors else self._left

    def going_on(self, round: Round, survival_R: Array, drawn: int) -> bool:
        """Whether the drafter draws another slot after `drawn` of them, by the drafting requests' survival so far.

        Where a block ends tells of all requests' tokens. A walk decides on a slot without knowing which later ones
        exist; a ranking over all slots, such as `Greedy`, would leak.
        """
        most, drafting = max(round.asked_R), len(survival_R)
        draft_K1 = self.prices.drafts(round, most)[drafting]
        verify_N1 = self.prices.verifying(round, drafting * most)
        return worth_drafting(
            survival_R * self.worth.of(round)[:drafting] * (np.asarray(round.asked_R[:drafting]) > drawn),
            self.means.ahead(most)[drawn - 1, drawn:],
            row_seconds=float(verify_N1[-1] - verify_N1[drafting * drawn]) / (drafting * (most - drawn)),
            draft_seconds_J=draft_K1[drawn + 1 :] - draft_K1[drawn],
            tokens_per_second=self.rate,
        )

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """The walk's plan at the present price of time."""
        if survival_RK is None:
            return [0] * round.requests
        a_RK = as_array(survival_RK)
        if round.requests == 1:
            return [self._alone(a_RK[0].tolist(), round)]
        asked_R = round.asked_R or round.limit_R
        seconds_N1 = self.prices.verifying(round, sum(asked_R))
        weight_R = self.worth.of(round)
        ahead_KK = self.means.ahead(a_RK.shape[1])

        def score(gain_N1: Array, admitted: int) -> Array:
            return gain_N1 - self.rate * seconds_N1[admitted : admitted + len(gain_N1)]

        return walk(a_RK * weight_R[:, None], round.limit_R, asked_R, ahead_KK, score)

    def observe(self, outcome: Outcome) -> None:
        """Keep the round for the next decision, and let exploring earn its share of the time."""
        earned = EXPLORE * (outcome.seconds + outcome.rest_seconds)
        self._allowance = min(self._allowance + earned, 50 * outcome.seconds)
        self._hold(outcome)
        if outcome.survival_RK is not None:
            self._heard.append(outcome)
        if self.worth.floors:
            self.worth.observe(outcome)

    def _hold(self, outcome: Outcome) -> None:
        """Tell the guard what the step took."""
        round, planned = outcome.round, sum(outcome.plan)
        seconds_N1 = self.prices.verifying(round, planned)
        price = float(seconds_N1[planned])
        if outcome.survival_RK is not None:
            price += self.prices.drafting(round, max(round.limit_R), sum(n > 0 for n in round.asked_R))
        self.guard.observe(outcome, price, float(seconds_N1[0]))

    def _alone(self, survival_K: list[float], round: Round) -> int:
        """`walk` for one request: what it weighs at slot k is linear in its survival, so a bound decides."""
        limit = round.limit_R[0]
        asked = (round.asked_R or round.limit_R)[0]
        if len(self._stop_K) != asked:
            self._stop_K = self._stops(round, asked)
        for k, (survival, bound) in enumerate(zip(survival_K[:limit], self._stop_K, strict=False)):
            if survival <= bound:
                return k
        return limit

    def _stops(self, round: Round, asked: int) -> list[float]:
        """The survival at each slot of one request below which no set of rows from there on pays."""
        seconds_N1 = self.prices.verifying(round, asked)
        ahead_KK = np.cumsum(self.means.ahead(asked), axis=1)
        weight = float(self.worth.of(round)[0])
        more = [self.rate * (seconds_N1[k + 1 :] - seconds_N1[k]) / (weight * ahead_KK[k, k:]) for k in range(asked)]
        return [float(bound.min()) for bound in more]

    def _decide(self, round: Round) -> None:
        """Weigh every choice anew."""
        self._learn()
        self._for = (list(round.request_ids), round.prefill_rows > 0)
        most = max(round.limit_R)
        survival_RK = self.acceptance.survival(round, most)
        order_RK, self._rate_MK = self._rates(round, survival_RK, self.worth.of(round))
        drafting, slots = (int(i) for i in np.unravel_index(int(self._rate_MK.argmax()), self._rate_MK.shape))
        self.rate = float(self._rate_MK[drafting, slots])
        self._choice = [0] * round.requests
        if drafting and slots:
            for r in order_RK[:drafting, slots - 1].tolist():
                self._choice[r] = slots
        self._stop_K = []
        self._keep(round)

    def _again(self, round: Round) -> None:
        """The same requests some steps later; where nothing was drafted there is nothing new to weigh."""
        if self._heard or self.worth.floors:
            self._decide(round)
        else:
            self._keep(round)
            if not any(self._kept):
                self._left = REST

    def _keep(self, round: Round) -> None:
        self._kept, self._left = list(self._choice), KEEP
        if any(self._choice) and round.request_ids and self.guard.try_plain(round.requests):
            self._kept, self._left = [0] * round.requests, 1
            return
        self._explore(round)

    def _rates(self, round: Round, survival_RK: Array, weight_R: Array) -> tuple[NDArray[np.intp], Array]:
        """By slots, requests in the order of gain, [R, K], and tokens per second with the first M, [R + 1, K + 1]."""
        requests, most = survival_RK.shape
        limit_R1 = np.asarray(round.limit_R)[:, None]
        slot_K = np.arange(1, most + 1)
        rows_RK = np.minimum(slot_K, limit_R1)
        gain_RK = np.cumsum(weight_R[:, None] * survival_RK * (slot_K <= limit_R1), axis=1)
        gain_RK += np.array([self._option_K.get(slots, 0.0) for slots in slot_K.tolist()]) * (limit_R1 > 0)
        order_RK = np.argsort(-gain_RK, axis=0, kind="stable")
        gain_MK, rows_MK = np.zeros((2, requests + 1, most + 1))
        np.cumsum(np.take_along_axis(gain_RK, order_RK, 0), axis=0, out=gain_MK[1:, 1:])
        np.cumsum(np.take_along_axis(rows_RK, order_RK, 0), axis=0, out=rows_MK[1:, 1:])
        verify_N1 = self.prices.verifying(round, int(rows_MK[-1, -1]))
        seconds_MK = verify_N1[rows_MK.astype(np.intp)] + self.prices.drafts(round, most)
        seconds_MK *= self.guard.factor(requests, drafting=True)
        plain = float(verify_N1[0]) * self.guard.factor(requests, drafting=False)
        seconds_MK[0, :] = seconds_MK[:, 0] = plain
        return order_RK, (weight_R.sum() + gain_MK) / seconds_MK

    def _explore(self, round: Round) -> None:
        """Let requests draft that have not for long, as far as the allowance goes; for one step."""
        for request, kept in zip(round.request_ids, self._kept, strict=False):
            self._undrafted[request] = 0 if kept else self._undrafted.get(request, 0) + KEEP
        if len(self._undrafted) > 4 * len(round.request_ids) + 64:
            self._undrafted = {request: self._undrafted[request] for request in round.request_ids}
        idle = [
            r
            for r, (request, kept, limit) in enumerate(zip(round.request_ids, self._kept, round.limit_R, strict=False))
            if not kept and limit and self._undrafted[request] >= STALE
        ]
        if not idle:
            return
        tried = sorted(idle, key=lambda r: -self._undrafted[round.request_ids[r]])[: max(1, round.requests // 8)]
        slots = max(self._choice)
        width = slots or 1 + int(self._rate_MK[1:, 1:].max(0).argmax())
        drafting = sum(kept > 0 for kept in self._kept)
        verified = sum(self._kept) + width * len(tried)
        before = self.prices.verifying(round, verified)[sum(self._kept)] + self.prices.drafting(round, slots, drafting)
        after = self.prices.verifying(round, verified)[-1] + self.prices.drafting(round, width, drafting + len(tried))
        if after - before > self._allowance:
            return
        self._allowance -= float(after - before)
        self._left = 1
        for r in tried:
            self._kept[r] = width
            self._undrafted[round.request_ids[r]] = 0

    def _learn(self) -> None:
        heard, self._heard = self._heard, []
        if not heard:
            return
        self.acceptance.learn(heard)
        last = heard[-1]
        width = last.survival_RK.shape[1] if last.survival_RK is not None else 0
        alike = [o for o in heard if o.survival_RK is not None and o.survival_RK.shape[1] == width]
        limits = [limit for outcome in alike for limit in outcome.round.limit_R]
        self.means.observe(
            np.concatenate([o.survival_RK for o in alike if o.survival_RK is not None]), limits, len(alike)
        )
        self._value_choice(last, len(heard))

    def _value_choice(self, outcome: Outcome, rounds: int) -> None:
        """What a plan was worth beyond verifying everything, in tokens a drafting request; it stands for `rounds`."""
        round, a_RK = outcome.round, outcome.survival_RK
        assert a_RK is not None
        slot_K = np.arange(a_RK.shape[1])
        cut_RK = (slot_K >= np.asarray(outcome.plan)[:, None]) & (slot_K < np.asarray(round.limit_R)[:, None])
        drafted, planned = sum(round.limit_R), sum(outcome.plan)
        seconds_N1 = self.prices.verifying(round, drafted)
        saved = self.rate * float(seconds_N1[drafted] - seconds_N1[planned])
        lost = float((self.worth.of(round)[:, None] * a_RK * cut_RK).sum())
        slots, drafting = max(round.asked_R or round.limit_R), sum(limit > 0 for limit in round.limit_R)
        known = self._option_K.get(slots, 0.0)
        self._option_K[slots] = known + (1 - OPTION_MEMORY**rounds) * (max(saved - lost, 0.0) / drafting - known)
