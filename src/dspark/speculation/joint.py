"""The joint planner: who drafts, how many slots, and how many of them are verified, under one price of time.

R requests, K draft slots, N drafted tokens verified.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from dspark.speculation.acceptance import Acceptance
from dspark.speculation.choice import TRIED, Choice, ids_of, weigh
from dspark.speculation.circles import NOBODYS, Circle, circle_of
from dspark.speculation.ending import worth_drafting
from dspark.speculation.finished import Finished, Followed, enough
from dspark.speculation.guard import size_of
from dspark.speculation.looks import Looks
from dspark.speculation.paying import paying
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Outcome, Round
from dspark.speculation.scheduled import Priced, RunningMeans, widest
from dspark.speculation.trials import STEPS, Trials
from dspark.speculation.worth import Worth

KEEP = 8  # steps between two decisions about who drafts, once they come to the same
LONGEST = 512  # ... and at most
FIRST = 4  # ... at first, and twice as many with each decision that comes to the same as the one before it
DECISION = 1.3e-3, 1e-5  # s that one is taken to cost, and for each request
DECIDING = 0.003  # share of the time that decisions may take
HELD = 8  # steps that are held against their prices at a decision
FIRST_LOOK = 4  # decisions before the first look at whole drafts: what later slots bring, and what choosing would have
LOOKING = 0.03  # share of the steps that looks may be
PATIENCE = 8  # how much rarer they become at most, while none of them changes anything
ENOUGH = 16  # requests' rounds of a look


class Joint(Priced):
    """Maximises expected tokens less the price of time. The price is the best rate that any choice here reaches.

    Before drafting: for every number of slots, the requests in the order of what their drafts are expected to bring;
    the best (slots, requests) of all, drafting nothing included. It stands for some steps; requests that come meanwhile
    draft if their circle's drafts are as good. After drafting: everything, where `Looks` say that choosing wins less
    than it takes; else a bound on survival, or where the step's price has cliffs a walk over slots as in `Lookahead`.
    """

    def __init__(self, prices: Prices, first: Acceptance | None = None):
        super().__init__(prices)
        self.acceptance = first or Acceptance()
        self.means = RunningMeans()
        self.worth = Worth()
        self.trials = Trials()
        self.looks = Looks()
        self.choice = Choice(0)  # the present one
        self.decisions = 0
        self._choices: dict[int, Choice] = {}  # by size
        self._step = 0
        self._heard: list[tuple[Outcome, bool]] = []  # and whether it was a trial or a look
        self._followed: list[Followed] = []
        self._won = 0  # tokens of the requests under trial
        self._took = 0.0  # s of the steps of the trial
        self._unseen = sys.maxsize  # steps since the last look
        self._patience = 1
        self._looking = False  # drafts of all slots are verified whole, their confidences read

    def slots(self, round: Round) -> list[int]:
        """Slots by request: the standing choice of this size, or a new one."""
        size = size_of(round.requests)
        if size != self.choice.size:
            if self._looking or self.trials.running:
                self._end_probe()
                self._choices.pop(self.choice.size)
            self.choice = self._choices.get(size) or Choice(size)
        if self._step >= self.choice.until:
            self._decide(round)
        self._step += 1
        self._unseen += 1
        chosen, ids = self.choice.slots, ids_of(round)
        slots_R = [chosen.get(request, -1) for request in ids]
        if -1 in slots_R:
            for r in (r for r, slots in enumerate(slots_R) if slots < 0):
                circle = circle_of(round.params_R[r]) if round.params_R else NOBODYS
                slots_R[r] = chosen[ids[r]] = self._newcomer(round, circle)
        slots_R = [limit if limit < slots else slots for slots, limit in zip(slots_R, round.limit_R, strict=True)]
        self._forbidden = 0
        if any(slots_R) and self.worth.alike and not self.guard.allows(round.requests):
            self._forbidden = round.requests
            return [0] * round.requests
        return slots_R

    @property
    def rest(self) -> int:
        """Steps for which nobody drafting holds, while the requests are as many; 0 where a step's speed matters."""
        return 0 if self.worth.floors else super().rest if self._forbidden else self.choice.until - self._step

    @property
    def takes_all(self) -> bool:
        """Whether every draft is verified whole: choosing after drafting would win less than the time it takes."""
        return self.choice.whole and not self._looking

    @property
    def looking(self) -> bool:
        """Whether every draft is verified whole, by a choice older than it, and its confidences are read."""
        return self._looking

    @property
    def standing(self) -> tuple[Choice, int] | None:
        """A choice that holds as it is, for so many steps of its size; None where each step must be asked about."""
        if self._forbidden or self.trials.running or self.worth.floors or not (self.takes_all and self.choice.width):
            return None
        return self.choice, self.choice.until - self._step

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
            tokens_per_second=self.choice.rate,
        )

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """What is worth its rows at the present price of time."""
        if survival_RK is None:
            return [0] * round.requests
        if self._looking:
            return list(round.limit_R)
        return paying(round, survival_RK, self.choice, prices=self.prices, means=self.means, worth=self.worth)

    def observe(self, outcome: Outcome) -> None:
        """Keep the round for the next decision."""
        self.trials.earn(outcome.seconds, outcome.seconds / max(outcome.rest_steps, 1))
        trial = bool(self.trials.running)
        if trial:
            ids = outcome.round.request_ids
            self._took += outcome.seconds
            self._won += sum(n for i, n in zip(ids, outcome.accepted_R, strict=False) if i in self.trials.running)
        self._heard.append((outcome, trial or self._looking))  # neither is what was chosen as best
        self._step += outcome.rest_steps
        if self.worth.floors:
            self.worth.observe(outcome)

    def catch_up(self, followed: Followed) -> None:
        """Take the steps that were done by the `standing` choice without being asked about."""
        self.trials.earn(followed.seconds, followed.seconds / followed.steps)
        self.guard.pass_by(followed.requests, followed.steps)
        self._step += followed.steps
        self._unseen += followed.steps
        self._followed.append(followed)

    def _newcomer(self, round: Round, circle: Circle) -> int:
        """Slots of a request that no decision knows: the others', if its circle's acceptance pays for them."""
        choice = self.choice
        if circle in choice.newcomers:
            return choice.newcomers[circle]
        most = choice.width or max(round.limit_R)
        others = min(choice.drafting, round.requests - 1)
        draft_MK = self.prices.drafts(round, most)
        seconds_K = (draft_MK[others + 1] - draft_MK[others])[1:] + choice.row * np.arange(1, most + 1)
        seconds_K *= choice.rate * self.guard.factor(round.requests, drafting=True)
        worth_K = np.cumsum(self.acceptance.newcomers(circle, most)) > seconds_K
        pays = bool(worth_K[-1] if choice.width else worth_K.any())
        if pays and not choice.width:
            choice.until = 0  # somebody may be worth drafting for: weigh it all
        choice.newcomers[circle] = choice.width if pays else 0
        return choice.newcomers[circle]

    def _decide(self, round: Round) -> None:
        """Weigh every choice anew."""
        before, looked = self.choice, self._looking
        self._end_probe()
        self.decisions += 1
        round = round.without_prefill()
        most = max(round.limit_R)
        if not most:
            self.choice = Choice(before.size, dict.fromkeys(ids_of(round), 0), until=self._step + KEEP)
            self._choices[before.size] = self.choice
            return
        self.choice = choice = weigh(
            round,
            self.acceptance.survival(round, most),
            self.worth.of(round),
            prices=self.prices,
            guard=self.guard,
            looks=self.looks,
            before=before if before.rate else None,
        )
        self._choices[choice.size] = choice
        if looked:
            self._patience = min(2 * self._patience, PATIENCE) if choice.whole == before.whole else 1
        self._pace(round)

    def _pace(self, round: Round) -> None:
        """How long the choice stands, and whether something else is tried first."""
        choice, most = self.choice, max(round.limit_R)
        step = sum(self.worth.of(round)) / choice.rate
        cost = DECISION[0] + DECISION[1] * round.requests
        ids = ids_of(round)
        drafting = [request for request in ids if choice.slots[request]]
        self.trials.drafted(drafting)
        idle = [
            request for request, limit in zip(ids, round.limit_R, strict=True) if limit and not choice.slots[request]
        ]
        left = min(max(round_up(cost / (DECIDING * step)), KEEP), LONGEST, FIRST << min(choice.steady, 30))
        look = round_up(ENOUGH / max(len(drafting), 1))
        if drafting and self.decisions >= FIRST_LOOK and look * self._patience <= LOOKING * self._unseen:
            self._looking, self._unseen, left = True, 0, look
            choice.slots.update(dict.fromkeys(drafting, most))
        elif idle:
            left = self._try(round, idle, len(drafting), cost) or left
        choice.until = self._step + left

    def _try(self, round: Round, idle: list[int], drafting: int, decision: float) -> int:
        """Let requests draft that do not, as far as the allowance goes, else wait for it.

        In turn those that come next to paying, and those that have not drafted for longest. Returns for how many steps;
        0 for as long as the choice holds. A `decision` of so many seconds ends a trial.
        """
        choice, width = self.choice, self.choice.tried_width
        if choice.rival is not None and self.trials.started % 2 == 0:
            tried, expected = choice.rival.requests, choice.rival.expected
            more = choice.rival.seconds + decision / STEPS
        else:
            tried, expected = self.trials.oldest(idle, max(1, round.requests // TRIED)), 0.0
            verified = choice.width * drafting
            table_N1 = self.prices.verifying(round, verified + width * len(tried))
            more = float(table_N1[-1] - table_N1[verified]) + self.prices.drafting(round, width, drafting + len(tried))
            more -= self.prices.drafting(round, choice.width, drafting)
            more = more * self.guard.factor(round.requests, drafting=True) + decision / STEPS
        if self.trials.start(tried, more, expected):
            self._won, self._took = 0, 0.0
            choice.slots.update(dict.fromkeys(tried, width))
            self.trials.drafted(tried)
            return STEPS
        return 0 if drafting else max(self.trials.steps_until(more - expected, choice.plain), KEEP)

    def _end_probe(self) -> None:
        """Learn from the steps since the last decision, and so end a trial or a look."""
        if self.trials.running:
            alone = not self.choice.width  # else the others' drafts are part of it
            self.trials.settle(self._won, self.choice.rate, self._took - STEPS * self.choice.plain if alone else 0.0)
        self._learn()
        self._looking = False

    def _learn(self) -> None:
        most = enough(self._heard[-1][0].round.requests) if self._heard else 0
        heard, self._heard = self._heard[-most:], []
        followed, self._followed = self._followed, []
        for outcome in (outcome for one in followed for outcome in one.last):
            self.guard.observe(outcome, self.prices)
        for outcome, trial in heard[-HELD:]:
            self.guard.observe(outcome, self.prices, booked=not trial)
        rounds = [outcome for outcome, _ in heard if outcome.drafting]
        self.acceptance.learn(Finished.of(rounds, [one.finished for one in followed]))
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
