"""Keeps confidences true while the engine serves: every slot's fit follows the outcomes of earlier rounds.

R requests, K draft slots. Only verified slots have outcomes, and only once the slots before were accepted: a slot that
the plan cut off is censored, not rejected. Audited rounds are verified in full, by a choice older than their drafts:
they teach like all others, and being a fair sample they can be scored. The offline fit comes first; what follows the
outcomes is a slope and a shift on the logits of what it says, none to begin with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.speculation.calibration import Calibration, Fit, bent, law_of, logit, sigmoid
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Array, Round

MEMORY = 1000.0  # outcomes of a slot after which an older one counts 1/e
PRIOR = 20.0  # outcomes that the wider circle's fit counts for
AUDITED = 1024  # rounds kept to say how true confidences are
REFRESH = 32  # requests' rounds heard, over STEPS steps or more, before the fits move
STEPS = 4
ALARM = 12.0  # of the drift sum, in standard deviations
SLACK = 0.25  # ... that a round may be off without counting
AFTER_DRIFT = 0.25  # share of what was learnt that stays when drift is found


@dataclass(frozen=True)
class Heard:
    """One step's outcomes, kept until the fits move."""

    circles: Sequence[tuple[str, str]]
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
        self._heard: list[Heard] = []
        self._key: tuple[Sequence[int], int] | None = None
        self._weights: tuple[Array, Array] = (np.ones(0), np.ones(0))
        self._offline: tuple[Array, Array] = (np.ones(0), np.ones(0))
        self._curves: list[tuple[NDArray[np.intp], Array]] = []  # rows and [K, G] of the laws that have one
        self._circles: list[tuple[str, str]] = []
        self._said_z_RK: Array = np.zeros((0, 0))  # logits of what the offline fit said of the last round

    def confidence(self, round: Round, raw_RK: Array) -> Array:
        """Calibrated confidences, [R, K]; remembers the circles of the round's requests."""
        key = (round.request_ids, raw_RK.shape[1])
        if self._key != key or not round.request_ids:
            self._circles = [(law_of(p), p.speculation_group) for p in round.params_R] or [("sampled", "")] * len(
                raw_RK
            )
            self._refresh(raw_RK.shape[1])
            self._key = key
        z_RK = logit(raw_RK) * self._offline[0] + self._offline[1]
        for rows, curve_KG in self._curves:
            z_RK[rows] = logit(bent(sigmoid(z_RK[rows]), curve_KG))
        self._said_z_RK = z_RK
        return sigmoid(z_RK * self._weights[0] + self._weights[1])

    def observe(
        self, raw_RK: Array, plan: Sequence[int], accepted_R: Sequence[int], audited_R: Sequence[int] = ()
    ) -> None:
        """Take the outcomes of the round that `confidence` was last asked about; `audited_R` are indices."""
        z_RK, (slope_RK, shift_RK) = self._said_z_RK, self._weights
        self._heard.append(Heard(self._circles, z_RK, plan, accepted_R))
        for r in audited_R:
            said_K = sigmoid(z_RK[r] * slope_RK[r] + shift_RK[r])[: plan[r]]
            self.audited.append(RoundRecord(r, tuple(said_K.tolist()), plan[r], accepted_R[r]))
        if len(self._heard) >= STEPS and len(self._heard) * len(raw_RK) >= REFRESH:
            self._learn()

    def fit(self, law: str, group: str = "") -> Fit:
        """What one circle's confidences are calibrated with now, but for the law's curve."""
        slope_K, shift_K = self._tracker((law, group), self.calibration.block_size).weight_K2.T
        before = self.calibration.fit(law)
        shift_K = shift_K + slope_K * np.array(before.shift)
        return Fit(tuple((slope_K * np.array(before.slope)).tolist()), tuple(shift_K.tolist()), ())

    def _learn(self) -> None:
        heard, self._heard, self._key = self._heard, [], None
        slots = max(step.logit_RK.shape[1] for step in heard)
        for circle in dict.fromkeys(c for step in heard for c in step.circles):
            parts = [_labels(step, [c == circle for c in step.circles], slots) for step in heard]
            z_NK, outcome_NK, known_NK = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            law, group = circle
            for one in dict.fromkeys([(law, ""), (law, group)]):
                tracker = self._tracker(one, slots)
                self.drifts += tracker.watch(z_NK, outcome_NK, known_NK)
                tracker.learn(z_NK, outcome_NK, known_NK)

    def _tracker(self, circle: tuple[str, str], slots: int) -> Tracker:
        tracker = self._trackers.get(circle)
        if tracker is None:
            law, group = circle
            none_K2 = np.tile([1.0, 0.0], (self.calibration.block_size, 1))
            prior_K2 = self._tracker((law, ""), slots).weight_K2 if group else none_K2
            tracker = self._trackers[circle] = Tracker(prior_K2)
        elif circle[1]:
            tracker.prior_K2 = self._tracker((circle[0], ""), slots).weight_K2
        return tracker

    def _refresh(self, slots: int) -> None:
        weight_RK2 = np.stack([self._tracker(circle, slots).weight_K2[:slots] for circle in self._circles])
        self._weights = weight_RK2[..., 0], weight_RK2[..., 1]
        laws = [law for law, _ in self._circles]
        fits = {law: self.calibration.fit(law) for law in dict.fromkeys(laws)}
        slope_RK, shift_RK = (
            np.array([getattr(fits[law], name)[:slots] for law in laws]) for name in ("slope", "shift")
        )
        self._offline = slope_RK, shift_RK
        rows = {law: np.array([row for row, one in enumerate(laws) if one == law]) for law in fits}
        self._curves = [(rows[law], np.array(fits[law].curve)) for law in fits if fits[law].curve]


class Tracker:
    """Slope and shift of every slot by forgetful logistic regression: one Newton step for every batch of outcomes."""

    def __init__(self, prior_K2: Array):
        self.prior_K2 = np.array(prior_K2, dtype=np.float64)
        self.weight_K2 = self.prior_K2.copy()
        self.bend_K22 = np.zeros((len(prior_K2), 2, 2))  # what the outcomes say about how sure the weights are
        self.alarm_2 = np.zeros(2)  # drift sums, for too confident and too shy

    def learn(self, z_NK: Array, outcome_NK: Array, known_NK: NDArray[np.bool_]) -> None:
        """Move by outcomes where `known`; forget by how many there were."""
        slots = z_NK.shape[1]
        weight_K2, bend_K22 = self.weight_K2[:slots], self.bend_K22[:slots]
        feature_NK2 = np.stack([z_NK, np.ones_like(z_NK)], -1) * known_NK[..., None]
        p_NK = sigmoid(np.clip(z_NK * weight_K2[:, 0] + weight_K2[:, 1], -30, 30))
        slope_K2 = ((p_NK - outcome_NK)[..., None] * feature_NK2).sum(0)
        fresh_K22 = np.einsum("nk,nki,nkj->kij", p_NK * (1 - p_NK), feature_NK2, feature_NK2)
        memory_K = np.exp(-known_NK.sum(0) / MEMORY)
        bend_K22[:] = bend_K22 * memory_K[:, None, None] + fresh_K22
        anchor_22 = 0.2 * PRIOR * np.array([[2.0, 0.0], [0.0, 1.0]])
        pull_K2 = np.einsum("ij,kj->ki", anchor_22, weight_K2 - self.prior_K2[:slots]) * (1 - memory_K)[:, None]
        move_K2 = np.linalg.solve(bend_K22 + anchor_22, (slope_K2 + pull_K2)[..., None])[..., 0]
        weight_K2 -= np.clip(move_K2, -0.5, 0.5)
        weight_K2[:, 0] = np.clip(weight_K2[:, 0], 0.05, 5.0)  # more confident must stay more likely

    def watch(self, z_NK: Array, outcome_NK: Array, known_NK: NDArray[np.bool_]) -> int:
        """Add up how far off fair outcomes are; on drift forget most of what was learnt. Returns whether there was."""
        slots = z_NK.shape[1]
        weight_K2 = self.weight_K2[:slots]
        p_NK = sigmoid(np.clip(z_NK * weight_K2[:, 0] + weight_K2[:, 1], -30, 30))
        spread = float(np.sqrt((p_NK * (1 - p_NK) * known_NK).sum()))
        if not spread:
            return 0
        off = float(((p_NK - outcome_NK) * known_NK).sum()) / spread
        self.alarm_2 = np.maximum(self.alarm_2 + np.array([off, -off]) - SLACK, 0.0)
        if self.alarm_2.max() < ALARM:
            return 0
        self.alarm_2[:] = 0.0
        self.bend_K22 *= AFTER_DRIFT
        return 1


def _labels(step: Heard, rows: list[bool], slots: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Logits, outcomes and where there are any, [N, K] each, of some requests of a step."""
    chosen = np.flatnonzero(rows)
    z_NK = np.zeros((len(chosen), slots))
    z_NK[:, : step.logit_RK.shape[1]] = step.logit_RK[chosen]
    plan_N1, accepted_N1 = np.array([step.plan, step.accepted_R])[:, chosen, None]
    slot_K = np.arange(slots)
    return z_NK, (slot_K < accepted_N1).astype(float), slot_K < np.minimum(accepted_N1 + 1, plan_N1)
