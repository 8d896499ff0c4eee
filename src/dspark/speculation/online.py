"""Keeps confidences true while the engine serves: every slot's fit follows the outcomes of earlier rounds.

R requests, K draft slots, N requests' rounds, C circles (law and group). Only verified slots have outcomes, and only
once the slots before were accepted: a slot that the plan cut off is censored, not rejected. Audited rounds are verified
in full, by a choice older than their drafts: they teach like all others, and being a fair sample they can be scored.
The offline fit comes first; what follows the outcomes is a slope and a shift on the logits of what it says, none to
begin with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.ops.calibrated import calibrated, sigmoid
from dspark.speculation.calibration import Calibration, Fit, law_of
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Array, Round

MEMORY = 1000.0  # outcomes of a slot after which an older one counts 1/e
PRIOR = 20.0  # outcomes that the wider circle's fit counts for
ANCHOR_2 = 0.2 * PRIOR * np.array([2.0, 1.0])  # ... as a bend of slope and shift
AUDITED = 1024  # rounds kept to say how true confidences are
REFRESH = 32  # requests' rounds heard, over STEPS steps or more, before the fits move
STEPS = 4
ALARM = 12.0  # of the drift sum, in standard deviations
SLACK = 0.25  # ... that a round may be off without counting
AFTER_DRIFT = 0.25  # share of what was learnt that stays when drift is found
REMEMBERED = 4096  # requests whose circle is known without a look at their parameters
CIRCLES = 1024  # with a fit of their own; the requests of more groups are calibrated with their law's


@dataclass(frozen=True)
class Heard:
    """One step's outcomes, kept until the fits move."""

    place_R: Sequence[int]  # of their circles
    logit_RK: Array
    plan: Sequence[int]
    accepted_R: Sequence[int]


class OnlineCalibration:
    """Calibrates by law and workload group; groups start from their law's running fit, laws from the offline fit's."""

    def __init__(self, calibration: Calibration):
        self.calibration = calibration
        self.drifts = 0  # found since the start
        self.audited: deque[RoundRecord] = deque(maxlen=AUDITED)  # calibrated as they were, full: a fair sample
        self._trackers: dict[tuple[str, str], Tracker] = {}
        self._circles: list[tuple[str, str]] = []
        self._places: dict[tuple[str, str], int] = {}
        self._of_request: dict[int, int] = {}  # place of its circle
        self._offline_C2K = self._online_C2K = np.zeros((0, 2, calibration.block_size))  # slope and shift
        self._curved_C: list[int] = []  # index of the circle's curve; -1: it has none
        self._curves: dict[str, Array] = {}  # [K, G] of the laws that have one
        self._heard: list[Heard] = []
        self._place_R: list[int] = []  # of the round that was last asked about
        self._said_z_RK: Array = np.zeros((0, 0))  # logits of what the offline fit said of it
        self._said_RK: Array = np.zeros((0, 0))  # what was said of it in the end

    def confidence(self, round: Round, raw_RK: Array) -> Array:
        """Calibrated confidences, [R, K]; remembers the circles of the round's requests."""
        self._place_R = self._whose(round, len(raw_RK))
        tables = self._offline_C2K, self._online_C2K, self._curved_C, list(self._curves.values())
        self._said_z_RK, self._said_RK = calibrated(raw_RK, self._place_R, *tables)
        return self._said_RK

    def observe(
        self, raw_RK: Array, plan: Sequence[int], accepted_R: Sequence[int], audited_R: Sequence[int] = ()
    ) -> None:
        """Take the outcomes of the round that `confidence` was last asked about; `audited_R` are indices."""
        self._heard.append(Heard(self._place_R, self._said_z_RK, plan, accepted_R))
        for r in audited_R:
            said_K = self._said_RK[r, : plan[r]].tolist()
            self.audited.append(RoundRecord(r, tuple(said_K), plan[r], accepted_R[r]))
        if len(self._heard) >= STEPS and len(self._heard) * len(raw_RK) >= REFRESH:
            self._learn()

    def fit(self, law: str, group: str = "") -> Fit:
        """What one circle's confidences are calibrated with now, but for the law's curve."""
        slope_K, shift_K = self._tracker((law, group)).weight_K2.T
        before = self.calibration.fit(law)
        shift_K = shift_K + slope_K * np.array(before.shift)
        return Fit(tuple((slope_K * np.array(before.slope)).tolist()), tuple(shift_K.tolist()), ())

    def _learn(self) -> None:
        heard, self._heard = self._heard, []
        place_N, *label_3KN = _labels(heard)
        for place in set(place_N):
            label_3KM = label_3KN
            if place_N.count(place) < len(place_N):
                own = np.flatnonzero(np.array(place_N) == place)
                label_3KM = [label_KN[:, own] for label_KN in label_3KN]
            law, group = self._circles[place]
            for one in dict.fromkeys([(law, ""), (law, group)]):
                self.drifts += self._tracker(one).learn(*label_3KM)
                if one in self._places:
                    self._online_C2K[self._places[one]] = self._trackers[one].weight_K2.T

    def _tracker(self, circle: tuple[str, str]) -> Tracker:
        tracker = self._trackers.get(circle)
        if tracker is None:
            law, group = circle
            none_K2 = np.tile([1.0, 0.0], (self.calibration.block_size, 1))
            tracker = self._trackers[circle] = Tracker(self._tracker((law, "")).weight_K2 if group else none_K2)
        elif circle[1]:
            tracker.prior_K2 = self._tracker((circle[0], "")).weight_K2
        return tracker

    def _whose(self, round: Round, requests: int) -> list[int]:
        """The circles of the round's requests."""
        known = self._of_request
        if not round.request_ids:
            circles = [(law_of(p), p.speculation_group) for p in round.params_R] or [("sampled", "")] * requests
            return list(map(self._place, circles))
        place_R = [known.get(request, -1) for request in round.request_ids]
        if -1 in place_R:
            if len(known) > REMEMBERED:
                known.clear()
            for r in (r for r, place in enumerate(place_R) if place < 0):
                params = round.params_R[r]
                place_R[r] = known[round.request_ids[r]] = self._place((law_of(params), params.speculation_group))
        return place_R

    def _place(self, circle: tuple[str, str]) -> int:
        """Where a circle stands in the tables; a new one is put at their end."""
        place = self._places.get(circle)
        if place is not None:
            return place
        law, group = circle
        if len(self._circles) >= CIRCLES and group:
            return self._place((law, ""))
        place = self._places[circle] = len(self._circles)
        self._circles.append(circle)
        fit = self.calibration.fit(law)
        self._offline_C2K = np.concatenate([self._offline_C2K, np.array([[fit.slope, fit.shift]])])
        self._online_C2K = np.concatenate([self._online_C2K, self._tracker(circle).weight_K2.T[None]])
        if fit.curve:
            self._curves.setdefault(law, np.array(fit.curve))
        self._curved_C.append(list(self._curves).index(law) if fit.curve else -1)
        return place


class Tracker:
    """Slope and shift of every slot by forgetful logistic regression: one Newton step for every batch of outcomes."""

    def __init__(self, prior_K2: Array):
        self.prior_K2 = np.array(prior_K2, dtype=np.float64)
        self.weight_K2 = self.prior_K2.copy()
        self.bend_K22 = np.zeros((len(prior_K2), 2, 2))  # what the outcomes say about how sure the weights are
        self.alarm_2 = np.zeros(2)  # drift sums, for too confident and too shy

    def learn(self, z_KN: Array, outcome_KN: Array, known_KN: Array) -> bool:
        """Move by outcomes where `known` is 1; forget by how many there were. Returns whether they have drifted."""
        weight_K2, bend_K22 = self.weight_K2[: len(z_KN)], self.bend_K22[: len(z_KN)]
        p_KN = sigmoid(z_KN * weight_K2[:, :1] + weight_K2[:, 1:])
        off_KN, spread_KN = (p_KN - outcome_KN) * known_KN, p_KN * (1 - p_KN) * known_KN
        leaning_KN = spread_KN * z_KN
        slope_2K = np.array([np.vecdot(off_KN, z_KN), off_KN.sum(1)])
        low_K, both_K, high_K = np.vecdot(leaning_KN, z_KN), leaning_KN.sum(1), spread_KN.sum(1)
        drifted = self._watch(float(slope_2K[1].sum()), float(high_K.sum()))
        memory_K = np.exp(-known_KN.sum(1) / MEMORY)
        bend_K22 *= memory_K[:, None, None]
        bend_K22 += np.array([[low_K, both_K], [both_K, high_K]]).T
        pull_K2 = (weight_K2 - self.prior_K2[: len(z_KN)]) * ANCHOR_2 * (1 - memory_K)[:, None]
        move_K2 = np.linalg.solve(bend_K22 + np.diag(ANCHOR_2), (slope_2K.T + pull_K2)[..., None])[..., 0]
        weight_K2 -= np.minimum(np.maximum(move_K2, -0.5), 0.5)
        weight_K2[:, 0] = np.minimum(np.maximum(weight_K2[:, 0], 0.05), 5.0)  # more confident must stay more likely
        return drifted

    def _watch(self, off: float, spread: float) -> bool:
        """Add up how far off fair outcomes are; on drift forget most of what was learnt."""
        if not spread:
            return False
        off /= math.sqrt(spread)
        self.alarm_2 = np.maximum(self.alarm_2 + np.array([off, -off]) - SLACK, 0.0)
        if self.alarm_2.max() < ALARM:
            return False
        self.alarm_2[:] = 0.0
        self.bend_K22 *= AFTER_DRIFT
        return True


def _labels(heard: Sequence[Heard]) -> tuple[list[int], Array, Array, Array]:
    """Circles, logits, outcomes and 1 where there are any, [K, N] each, of some steps."""
    slots = max(step.logit_RK.shape[1] for step in heard)
    z_KN = np.zeros((slots, sum(len(step.plan) for step in heard)))
    done = 0
    for step in heard:
        requests, width = step.logit_RK.shape
        z_KN[:width, done : done + requests] = step.logit_RK.T
        done += requests
    plan_N = np.array([n for step in heard for n in step.plan])
    accepted_N = np.array([n for step in heard for n in step.accepted_R])
    slot_K1 = np.arange(slots)[:, None]
    known_KN = slot_K1 < np.minimum(accepted_N + 1, plan_N)
    return (
        [n for step in heard for n in step.place_R],
        z_KN,
        (slot_K1 < accepted_N).astype(float),
        known_KN.astype(float),
    )
