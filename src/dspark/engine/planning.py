"""Asks the planner for a step's lengths, and tells it what became of them.

R requests of the step, K draft slots.
"""

from __future__ import annotations

import time

import numpy as np
from torch import Tensor

from dspark.drafters.base import Draft, GoingOn
from dspark.engine.admission import Schedule
from dspark.engine.assemble import Assembled
from dspark.engine.following import Following, round_of
from dspark.engine.rest import Rest, Share
from dspark.speculation.ledger import Ledger
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import Planner
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Array, Outcome, Round, as_array
from dspark.speculation.verify import Verdict

AUDIT = 0.02  # share of drafting requests whose whole draft is verified, so that its outcomes are a fair sample
LEARNING = 0.01  # share of the time that the calibration may take to learn from rounds that were not audited


class Planning:
    """One engine's planner and calibration, from the slots of a round to its outcome.

    While the planner says that nobody drafts, and for how long (`rest`), it is not asked: a plain step of a small model
    is shorter than its questions. It is asked again when a request comes or the requests become fewer by a bit.
    While it says that all that is drafted is verified (`takes_all`), confidences are read only to learn from; while it
    also says that its choice is `standing`, it is not asked and nothing is read.
    """

    def __init__(self, planner: Planner, *, seed: int | None = None):
        self._planner = planner
        self.calibration: OnlineCalibration | None = None  # None: confidences are taken as they are
        self.live: LiveCost | None = None  # the cost the planner reads, where it reads one
        self.ledger = Ledger()
        self._rest = Rest()
        self._following = Following()
        self._clock = Share(LEARNING)
        self._chance = np.random.default_rng(seed)
        self._audit = int(self._chance.geometric(AUDIT)) - 1  # requests' rounds until the next audit
        self._schedule: Schedule | None = None  # None while nothing can be drafted
        self._round: Round | None = None  # ... or the planner was not asked
        self._audited: list[int] = []
        self._raw_RK: Array | None = None
        self._survival_RK: Array | None = None
        self._unread = False  # whether the round's drafts are verified whole, without a look at their confidences
        self._followed = False  # ... and the planner was not asked either

    @property
    def planner(self) -> Planner:
        """Who is asked; a new one owes nothing to what the last one said."""
        return self._planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._planner, self._rest, self._following = planner, Rest(), Following()

    @property
    def reads_confidence(self) -> bool:
        """Whether the planner, or what it would learn from, makes anything of what the drafter thinks of its tokens."""
        if self._followed:
            return False
        return self.calibration is not None or getattr(self.planner, "reads_confidence", True)

    def going_on(self, drafting: int) -> GoingOn | None:
        """What ends the block of `drafting` requests early; None where the planner has no say in that."""
        decide, schedule, round = getattr(self.planner, "going_on", None), self._schedule, self._round
        if decide is None or schedule is None or not any(schedule.limits):
            return None
        raw_RK, drawn = np.zeros((len(schedule.limits), max(schedule.limits))), 0

        def answer(confidence_R: Tensor) -> bool:
            nonlocal drawn, round
            raw_RK[:drafting, drawn] = as_array(confidence_R.cpu().numpy())
            drawn += 1
            if round is None:  # few drafters ask, and the planner was not
                round = round_of(schedule).drafted(schedule.limits, schedule.limits)
            said_RK = raw_RK if self.calibration is None else self.calibration.confidence(round, raw_RK)
            return bool(decide(round, said_RK[:drafting, :drawn].prod(1), drawn))

        return answer

    def slots(self, schedule: Schedule) -> int:
        """Set how many tokens each request drafts, those that draft in front; returns the most of any."""
        self._schedule = self._round = self._survival_RK = self._raw_RK = None
        self._unread = self._followed = False
        if self._rest.holds(schedule):
            schedule.limits = [0] * len(schedule.sampled)
            return 0
        if not any(schedule.limits):
            return 0
        if self._following.holds(schedule):
            self._followed, self._schedule = True, schedule
            return max(schedule.limits)
        self._wake()
        before = round_of(schedule)
        schedule.limits = self.planner.slots(before)
        if not any(schedule.limits):
            self._round = before
            self._rest = Rest.of(getattr(self.planner, "rest", 0), before, getattr(self.planner, "choice", None))
            return 0
        self._schedule, order = schedule, schedule.drafting_first()
        self._round = before.drafted(schedule.limits, schedule.limits, order)
        self._following.take(getattr(self.planner, "standing", None))
        if self.calibration is not None:  # drawn now, before any token of the draft exists
            self._draw_audits(len(schedule.sampled))
        return max(schedule.limits)

    def plan(self, schedule: Schedule, draft: Draft | None) -> list[int]:
        """How many drafted tokens of each request are verified, within what was drafted and what fits."""
        if draft is None or not (self._round or self._followed):
            return [0] * len(schedule.sampled)
        limit_R = [most if most < own else own for own, most in zip(schedule.limits, draft.length_R, strict=True)]
        if self._round is None:
            return limit_R
        self._round = self._round.drafted(limit_R, schedule.limits)
        whole = getattr(self.planner, "takes_all", False)
        if whole and (self.calibration is None or not (self._audited or self._clock.due)):
            self._unread = True
            return limit_R
        before = time.perf_counter()
        confidence_RK: Array = as_array(draft.confidence_RK.cpu().numpy())
        missing = max(schedule.limits) - confidence_RK.shape[1]
        if missing > 0:  # where a block ended tells of its tokens: a planner sees as many slots as it asked for
            confidence_RK = np.pad(confidence_RK, ((0, 0), (0, missing)))
        self._raw_RK = confidence_RK
        if self.calibration is not None:
            confidence_RK = self.calibration.confidence(self._round, confidence_RK)
        self._survival_RK = np.asarray(np.multiply.accumulate(confidence_RK, axis=1))
        if whole:  # read to learn from alone
            self._clock.spend(time.perf_counter() - before)
            return limit_R
        plan = self.planner.plan(self._round, self._survival_RK)
        for r in self._audited:
            plan[r] = limit_R[r]
        return plan

    def observe(self, schedule: Schedule, verdict: Verdict, seconds: float) -> None:
        """Pass a finished round on; call it before the next."""
        self._clock.pass_by(seconds)
        if self._followed:
            self._following.observe(schedule, verdict.plan, verdict.accepted_R, seconds)
            self.ledger.draft(None, verdict.plan, verdict.accepted_R)
            return
        if self._round is None:
            if self._rest.round is not None:
                self._rest.observe(schedule, seconds)
                self.ledger.rest()
            return
        if self._unread:
            self.ledger.draft(None, verdict.plan, verdict.accepted_R)
        elif self._survival_RK is None:
            self.ledger.rest()
        else:
            audited = [r for r in self._audited if verdict.plan[r]]
            self.ledger.draft(self._survival_RK, verdict.plan, verdict.accepted_R, audited=len(audited))
            if self.calibration is not None and self._raw_RK is not None and (audited or self._clock.due):
                before = time.perf_counter()
                self.calibration.observe(self._raw_RK, verdict.plan, verdict.accepted_R, audited)
                self._clock.spend(time.perf_counter() - before)
        self._audited = []
        outcome = Outcome(self._round, verdict.plan, verdict.accepted_R, seconds, self._survival_RK, self._unread)
        self.planner.observe(outcome)

    def _wake(self) -> None:
        """Tell the planner of the steps for which it was not asked."""
        outcome, self._rest = self._rest.outcome(), Rest()
        if outcome is not None:
            self.planner.observe(outcome)
        followed = self._following.report()
        self._following.take(None)
        if followed is not None:
            self.planner.catch_up(followed)  # type: ignore[attr-defined]  # whoever has a standing choice takes them

    def _draw_audits(self, requests: int) -> None:
        """Every request's round is audited with the same chance; how many come before the next is drawn at once.

        A look verifies all drafts whole, and was decided on before them: it audits everyone.
        """
        if getattr(self.planner, "looking", False):
            self._audited = list(range(requests))
            return
        while self._audit < requests:
            self._audited.append(self._audit)
            self._audit += int(self._chance.geometric(AUDIT))
        self._audit -= requests


def records(schedule: Schedule, draft: Draft, verdict: Verdict) -> list[RoundRecord]:
    """What an observer gets: the requests that drafted something. One more read from the device than a step without."""
    drafted_R = [min(pair) for pair in zip(schedule.limits, draft.length_R, strict=True)]
    confidence_RK = draft.confidence_RK.tolist()
    feature_RKF = draft.feature_RKF.tolist() if draft.feature_RKF is not None else [[]] * len(drafted_R)
    columns = (schedule.sampled, confidence_RK, feature_RKF, drafted_R, verdict.plan, verdict.accepted_R)
    return [
        RoundRecord(
            request.id, tuple(confidence_K[:drafted]), verified, accepted, tuple(map(tuple, feature_KF[:drafted]))
        )
        for request, confidence_K, feature_KF, drafted, verified, accepted in zip(*columns, strict=True)
        if drafted
    ]


def step_load(schedule: Schedule, draft: Draft | None, step: Assembled) -> dict[str, int]:
    """What a step has to do, as a cost sees it."""
    wanted = len(step.rows_B)
    everyone = [*schedule.sampled, *(request for request, _ in schedule.partial)]
    return {
        "rows": wanted,
        "requests": len(schedule.sampled),
        "context": sum(request.cached for request in everyone),
        "prefill": len(step.batch.token_T) - wanted,
        "drafting": sum(limit > 0 for limit in schedule.limits) if draft is not None else 0,
        "slots": draft.token_RK.shape[1] if draft is not None else 0,
    }
