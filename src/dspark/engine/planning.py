"""Asks the planner for a step's lengths, and tells it what became of them.

R requests of the step, K draft slots.
"""

from __future__ import annotations

import numpy as np

from dspark.drafters.base import Draft
from dspark.engine.admission import Schedule
from dspark.engine.request import Request
from dspark.speculation.ledger import Ledger
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import Planner
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Array, Outcome, Round, as_array
from dspark.speculation.verify import Verdict

AUDIT = 0.02  # share of drafting requests whose whole draft is verified, so that its outcomes are a fair sample


class Planning:
    """One engine's planner and calibration, from the slots of a round to its outcome."""

    def __init__(self, planner: Planner, *, seed: int | None = None):
        self.planner = planner
        self.calibration: OnlineCalibration | None = None  # None: confidences are taken as they are
        self.live: LiveCost | None = None  # the cost the planner reads, where it reads one
        self.ledger = Ledger()
        self._rest = 0  # steps for which the planner's "nobody drafts" holds while the requests are the same
        self._resting: list[Request] = []
        self._rested: list[float] = []  # s of steps since
        self._chance = np.random.default_rng(seed)
        self._round: Round | None = None  # None while nothing can be drafted
        self._audited: list[int] = []
        self._raw_RK: Array | None = None
        self._survival_RK: Array | None = None

    def slots(self, schedule: Schedule) -> int:
        """Set how many tokens each request drafts, those that draft in front; returns the most of any."""
        self._round = self._survival_RK = self._raw_RK = None
        if not any(schedule.limits):
            return 0
        requests = schedule.sampled
        if self._rest > 0 and not schedule.partial and requests == self._resting:
            self._rest -= 1
            schedule.limits = [0] * len(requests)
            return 0
        before = Round(
            limit_R=schedule.limits,
            request_ids=[request.id for request in requests],
            context_R=[request.cached for request in requests],
            params_R=[request.params for request in requests],
            prefill_rows=sum(schedule.rows) - len(requests) + sum(rows for _, rows in schedule.partial),
        )
        schedule.limits = self.planner.slots(before)
        order = schedule.drafting_first()
        self._round = before.drafted(schedule.limits, schedule.limits, order) if any(schedule.limits) else before
        most = schedule.limits[0] and max(schedule.limits)
        if not most:
            self._rest, self._resting = getattr(self.planner, "rest", 0), list(requests)
        if most and self.calibration is not None:  # drawn now, before any token of the draft exists
            self._audited = np.flatnonzero(self._chance.random(len(requests)) < AUDIT).tolist()
        return most

    def plan(self, schedule: Schedule, draft: Draft | None) -> list[int]:
        """How many drafted tokens of each request are verified, within what was drafted and what fits."""
        if draft is None or self._round is None:
            return [0] * len(schedule.sampled)
        limit_R = [min(pair) for pair in zip(schedule.limits, draft.length_R, strict=True)]
        self._round = self._round.drafted(limit_R, schedule.limits)
        confidence_RK: Array = as_array(draft.confidence_RK.cpu())
        self._raw_RK = confidence_RK
        if self.calibration is not None:
            confidence_RK = self.calibration.confidence(self._round, confidence_RK)
        self._survival_RK = np.asarray(np.cumprod(confidence_RK, axis=1), dtype=np.float64)
        plan = self.planner.plan(self._round, self._survival_RK)
        for r in self._audited:
            plan[r] = limit_R[r]
        return plan

    def observe(self, verdict: Verdict, seconds: float) -> None:
        """Pass a finished round on; call it before the next."""
        if self._round is None:
            if self._resting:
                self._rested.append(seconds)
                self.ledger.rest()
            return
        if self._survival_RK is None:
            self.ledger.rest()
        else:
            audits = sum(verdict.plan[r] > 0 for r in self._audited)
            self.ledger.draft(self._survival_RK, verdict.plan, verdict.accepted_R, audited=audits)
        if self.calibration is not None and self._raw_RK is not None:
            audited = [r for r in self._audited if verdict.plan[r]]
            self.calibration.observe(self._raw_RK, verdict.plan, verdict.accepted_R, audited)
        self._audited = []
        rested, self._rested = self._rested, []
        outcome = Outcome(
            self._round, verdict.plan, verdict.accepted_R, seconds, self._survival_RK, sum(rested), len(rested)
        )
        self.planner.observe(outcome)


def records(schedule: Schedule, draft: Draft, verdict: Verdict) -> list[RoundRecord]:
    """What an observer gets: the requests that drafted something. One more read from the device than a step without."""
    drafted_R = [min(pair) for pair in zip(schedule.limits, draft.length_R, strict=True)]
    confidence_RK = draft.confidence_RK.tolist()
    rounds = zip(schedule.sampled, confidence_RK, drafted_R, verdict.plan, verdict.accepted_R, strict=True)
    return [
        RoundRecord(request.id, tuple(confidence_K[:drafted]), verified, accepted)
        for request, confidence_K, drafted, verified, accepted in rounds
        if drafted
    ]
