"""The joint planner: who drafts, how many slots, and how many of them are verified, under one price of time.

R requests, K draft slots, M = 0..R requests that draft, N drafted tokens verified.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.ops.walk import walk
from dspark.speculation.acceptance import Acceptance, groups_of
from dspark.speculation.ending import worth_drafting
from dspark.speculation.guard import size_of
from dspark.speculation.looks import Looks
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Outcome, Round, as_array
from dspark.speculation.scheduled import Priced, RunningMeans, widest
from dspark.speculation.trials import STEPS, Trials
from dspark.speculation.worth import Worth

KEEP = 8  # steps between two decisions about who drafts, at least
LONGEST = 128  # ... and at most, while anybody drafts
DECISION = 1.3e-3, 1e-5  # s that one is taken to cost, and for each request
CHOOSING = 2e-4, 2e-6  # s that reading and weighing a draft's confidences is taken to cost, and for each request
DECIDING = 0.01  # share of the time that decisions may take
HEARD = 256, 4  # requests' rounds that are learnt from at a decision, in at least so many steps
HELD = 8  # steps that are held against their prices at a decision
FIRST_LOOK = 4  # decisions before the first look at whole drafts: what later slots bring, and what choosing would have
LOOKING = 0.03  # share of the steps that looks may be
ENOUGH = 16  # requests' rounds of a look
STRAIGHT = 0.02  # of a step: prices this near to a line are taken for one


class Joint(Priced):
    """Maximises expected tokens less the price of time. The price is the best rate that any choice here reaches.

    Before drafting: for every number of slots, the requests in the order of what their drafts are expected to bring;
    the best (slots, requests) of all, drafting nothing included. It stands for some steps; requests that come meanwhile
    draft if their group's drafts are as good. After drafting: everything, where `Looks` say that choosing wins less
    than it takes; else a bound on survival, or where the step's price has cliffs a walk over slots as in `Lookahead`.
    """

    def __init__(self, prices: Prices, first: Acceptance | None = None):
        super().__init__(prices)
        self.acceptance = first or Acceptance()
        self.means = RunningMeans()
        self.worth = Worth()
        self.trials = Trials()
        self.looks = Looks()
        self.rate = 0.0  # tokens (by worth) per second of the present choice: the price of a second
        self._chosen: dict[int, int] = {}  # slots by request
        self._new: dict[str, int] = {}  # ... by group, of requests that the last decision did not know
        self._width = 0  # slots of those that draft
        self._tried_width = 0  # theirs, or the one that would come next to paying
        self._odds_K: list[float] = []  # everyone's, of acceptance
        self._left = 0  # steps until the next decision
        self._size = 0
        self._decisions = 0
        self._plain = 0.0  # s of a plain step
        self._heard: list[tuple[Outcome, bool]] = []  # and whether it was a trial or a look
        self._won = 0  # tokens of the requests under trial
        self._unseen = sys.maxsize  # steps since the last look
        self._looking = False  # drafts of all slots are verified whole, their confidences read
        self._row = 0.0  # s of one verified token, on average over the present choice
        self._bound: float | None = None  # on survival, for several requests under straight prices
        self._stop_K: list[float] = []  # ... by slot, for one request
        self._whole = False  # the present choice verifies drafts whole

    def slots(self, round: Round) -> list[int]:
        """Slots by request: the standing decision, or a new one."""
        if self._left <= 0 or size_of(round.requests) != self._size:
            self._decide(round)
        self._left -= 1
        self._unseen += 1
        chosen, ids = self._chosen, _ids(round)
        slots_R = [chosen.get(request, -1) for request in ids]
        if -1 in slots_R:
            groups = groups_of(round)
            for r in (r for r, slots in enumerate(slots_R) if slots < 0):
                slots_R[r] = chosen[ids[r]] = self._newcomer(round, groups[r])
        slots_R = [limit if limit < slots else slots for slots, limit in zip(slots_R, round.limit_R, strict=True)]
        self._forbidden = 0
        if any(slots_R) and self.worth.alike and not self.guard.allows(round.requests):
            self._forbidden = round.requests
            return [0] * round.requests
        return slots_R

    @property
    def rest(self) -> int:
        """Steps for which nobody drafting holds, while the requests are as many; 0 where a step's speed matters."""
        return 0 if self.worth.floors else super().rest if self._forbidden else self._left

    @property
    def takes_all(self) -> bool:
        """Whether every draft is verified whole: choosing after drafting would win less than the time it takes."""
        return self._whole and not self._looking

    def going_on(self, round: Round, survival_R: Array, drawn: int) -> bool:
        """Whether the drafter draws another slot after `drawn` of them, by the drafting requests' survival so far.

        Where a block ends tells of all requests' tokens. A walk decides on a slot without knowing which later ones
        exist; a ranking over all slots, such as `Greedy`, would leak.
        """
        if self._looking:  # blocks that ended where they look bad would leave only the good ones to be looked at
            return True
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
        """What is worth its rows at the present price of time."""
        if survival_RK is None:
            return [0] * round.requests
        if self._looking:
            return list(round.limit_R)
        if round.requests == 1:
            return [self._alone(survival_RK[0].tolist(), round)]
        a_RK, weight_R = as_array(survival_RK), self.worth.of(round)
        if self._bound is not None:
            worth_RK = a_RK if self.worth.alike else a_RK * weight_R[:, None]
            return np.minimum((worth_RK > self._bound).sum(1), round.limit_R).tolist()
        asked_R = round.asked_R or round.limit_R
        seconds_N1, ahead_KK = self.prices.verifying(round, sum(asked_R)), self.means.ahead(a_RK.shape[1])
        return walk(a_RK * weight_R[:, None], round.limit_R, asked_R, ahead_KK, seconds_N1, rate=self.rate)

    def observe(self, outcome: Outcome) -> None:
        """Keep the round for the next decision."""
        self.trials.earn(outcome.seconds, outcome.seconds / max(outcome.rest_steps, 1))
        trial = bool(self.trials.running)
        if trial:
            ids = outcome.round.request_ids
            self._won += sum(n for i, n in zip(ids, outcome.accepted_R, strict=False) if i in self.trials.running)
        self._heard.append((outcome, trial or self._looking))  # neither is what was chosen as best
        self._left -= outcome.rest_steps
        if self.worth.floors:
            self.worth.observe(outcome)

    def _newcomer(self, round: Round, group: str) -> int:
        """Slots of a request that no decision knows: the others', if its group's acceptance pays for them."""
        if group in self._new:
            return self._new[group]
        factor = self.acceptance.group_factor(group)
        survival, gain = 1.0, 0.0
        for odds in self._odds_K[: self._tried_width]:
            survival *= factor * odds / (1.0 + factor * odds)
            gain += survival
        others = min(sum(slots > 0 for slots in self._chosen.values()), round.requests - 1)
        seconds = self.prices.drafting(round, self._tried_width, others + 1) + self._row * self._tried_width
        seconds -= self.prices.drafting(round, self._tried_width, others)
        pays = gain > self.rate * seconds * self.guard.factor(round.requests, drafting=True)
        if pays and not self._width:
            self._left = 0  # somebody may be worth drafting for: weigh it all
        self._new[group] = self._width if pays else 0
        return self._new[group]

    def _alone(self, survival_K: list[float], round: Round) -> int:
        """`walk` for one request: what it weighs at slot k is linear in its survival, so a bound decides."""
        limit = round.limit_R[0]
        asked = (round.asked_R or round.limit_R)[0]
        if len(self._stop_K) != asked:
            self._stop_K = self._stops(round, asked)
        for k, (survival, bound) in enumerate(zip(survival_K[:limit], self._stop_K, strict=False)):
            if not survival > bound:
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
        trying = bool(self.trials.running)
        if trying:
            self.trials.settle(self._won, self.rate)
        self._learn(round.requests)
        self._size, self._decisions = size_of(round.requests), self._decisions + 1
        round = round.without_prefill()
        ids, most = _ids(round), max(round.limit_R)
        self._chosen, self._new, self._left = dict.fromkeys(ids, 0), {}, KEEP
        self._stop_K, self._bound, self._width, self._whole, self._looking = [], None, 0, False, False
        if not most:
            return
        survival_RK = self.acceptance.survival(round, most)
        order_RK, rate_MK = self._rates(round, survival_RK, self.worth.of(round))
        drafting, slots = (int(i) for i in np.unravel_index(int(rate_MK.argmax()), rate_MK.shape))
        self.rate = float(rate_MK[drafting, slots])
        if drafting and slots:
            self._width = slots
            for r in order_RK[:drafting, slots - 1].tolist():
                self._chosen[ids[r]] = slots
        self._tried_width = self._width or 1 + int(rate_MK[1:, 1:].max(0).argmax())
        mean_K = self.acceptance.conditional(most)
        self._odds_K = (mean_K / (1.0 - mean_K)).tolist()
        self._pace(round)
        self._price_rows(round)

    def _pace(self, round: Round) -> None:
        """How long the choice stands, and whether something else is tried first."""
        requests, most = round.requests, max(round.limit_R)
        step = sum(self.worth.of(round)) / self.rate
        cost = DECISION[0] + DECISION[1] * requests
        drafting = [request for request in _ids(round) if self._chosen[request]]
        self.trials.drafted(drafting)
        idle = [(r, request) for r, request in enumerate(_ids(round)) if not self._chosen[request] and round.limit_R[r]]
        self._left = min(max(round_up(cost / (DECIDING * step)), KEEP), LONGEST, 1 << min(self._decisions, 30))
        look = round_up(ENOUGH / max(len(drafting), 1))
        if drafting and self._decisions >= FIRST_LOOK and look <= LOOKING * self._unseen:
            self._looking, self._left, self._unseen = True, look, 0
            self._chosen.update(dict.fromkeys(drafting, most))
        elif idle:
            self._try(round, idle, len(drafting), self._tried_width)

    def _try(self, round: Round, idle: list[tuple[int, int]], drafting: int, width: int) -> None:
        """Let requests draft that have not for longest, as far as the allowance goes; else wait for it."""
        tried = self.trials.oldest(idle, max(1, round.requests // 8))
        verified = self._width * drafting
        table_N1 = self.prices.verifying(round, verified + width * len(tried))
        more = float(table_N1[-1] - table_N1[verified]) + self.prices.drafting(round, width, drafting + len(tried))
        more -= self.prices.drafting(round, self._width, drafting)
        more *= self.guard.factor(round.requests, drafting=True)
        if self.trials.start([request for _, request in tried], more):
            self._won, self._left = 0, STEPS
            for _, request in tried:
                self._chosen[request] = width
            self.trials.drafted([request for _, request in tried])
        elif not drafting:
            self._left = max(self.trials.steps_until(more, self._plain), KEEP)

    def _price_rows(self, round: Round) -> None:
        """Where the step's price rises along a line, a token is worth its row from one survival on, whoever's it is."""
        verified = sum(min(self._chosen[i], limit) for i, limit in zip(_ids(round), round.limit_R, strict=True))
        verified = max(verified, self._tried_width)
        table_N1 = self.prices.verifying(round, verified)
        self._row = float(table_N1[-1] - table_N1[0]) / verified
        off_N1 = table_N1 - table_N1[0] - self._row * np.arange(verified + 1)
        if float(np.abs(off_N1).max()) <= STRAIGHT * float(table_N1[0]):
            self._bound = self.rate * self._row

    def _rates(self, round: Round, survival_RK: Array, weight_R: Array) -> tuple[NDArray[np.intp], Array]:
        """By slots, requests in the order of gain, [R, K], and tokens per second with the first M, [R + 1, K + 1].

        With drafts verified whole, or chosen from in the time that this takes: whichever reaches more, `_whole` says.
        """
        requests, most = survival_RK.shape
        limit_R1 = np.asarray(round.limit_R)[:, None]
        slot_K = np.arange(1, most + 1)
        rows_RK = np.minimum(slot_K, limit_R1)
        gain_RK = np.cumsum(weight_R[:, None] * survival_RK * (slot_K <= limit_R1), axis=1)
        order_RK = np.argsort(-gain_RK, axis=0, kind="stable")
        gain_MK, rows_MK = np.zeros((2, requests + 1, most + 1))
        np.cumsum(np.take_along_axis(gain_RK, order_RK, 0), axis=0, out=gain_MK[1:, 1:])
        np.cumsum(np.take_along_axis(rows_RK, order_RK, 0), axis=0, out=rows_MK[1:, 1:])
        verify_N1 = self.prices.verifying(round, int(rows_MK[-1, -1]))
        seconds_MK = verify_N1[rows_MK.astype(np.intp)] + self.prices.drafts(round, most)
        seconds_MK *= self.guard.factor(requests, drafting=True)
        self._plain = float(verify_N1[0]) * self.guard.factor(requests, drafting=False)
        seconds_MK[0, :] = seconds_MK[:, 0] = self._plain
        whole_MK = (weight_R.sum() + gain_MK) / seconds_MK
        gain_MK[1:, 1:] += np.arange(1, requests + 1)[:, None] * self.looks.options(most, self.rate * self._row)
        seconds_MK[1:, 1:] += CHOOSING[0] + CHOOSING[1] * requests
        chosen_MK = (weight_R.sum() + gain_MK) / seconds_MK
        self._whole = bool(whole_MK.max() >= chosen_MK.max())
        return order_RK, whole_MK if self._whole else chosen_MK

    def _learn(self, requests: int) -> None:
        heard, self._heard = self._heard[-max(HEARD[0] // requests, HEARD[1]) :], []
        for outcome, trial in heard[-HELD:]:
            self.guard.observe(outcome, self.prices, booked=not trial)
        rounds = [outcome for outcome, _ in heard if outcome.drafting]
        self.acceptance.learn(rounds)
        rounds = [outcome for outcome in rounds if not outcome.unread]
        if not rounds:
            return
        a_NK, limit_N, count = widest(rounds)
        self.means.observe(a_NK, limit_N, count)
        if self._looking:
            self.looks.remember(rounds)


def round_up(value: float) -> int:
    """The next whole number; a large one for none at all."""
    return math.ceil(min(value, 1e6))


def _ids(round: Round) -> Sequence[int]:
    return round.request_ids or range(round.requests)
