"""Fits calibrations from rounds that were verified in full. (DSpark, §3.2.1: sequential temperature scaling)

N rounds, K draft slots, G points of a curve, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.common.errors import UserError
from dspark.ops.calibrated import logit, sigmoid
from dspark.speculation.calibration import Fit
from dspark.speculation.reliability import RoundRecord, expected_calibration_error, reliability
from dspark.speculation.round import Array

TEMPERATURES = np.geomspace(0.2, 5.0, 61)
LEAST_ROUNDS = 100  # that a fit needs at every slot
NEWTON_STEPS = 25
RIDGE = 1.0  # rounds' worth of belief in slope 1 and shift 0
POINTS = 41  # of a curve, even steps of the product
FLOOR_RUNS = 8  # simulated held-out sets whose mean error is the floor


Mask = NDArray[np.bool_]


class Rounds(NamedTuple):
    """Full rounds as arrays."""

    confidence_NK: Array  # not a number past the draft
    accepted_N: Array
    drafted_N: Array
    text_N: Array  # the request's number

    def of(self, chosen_N: Mask) -> Rounds:
        """Some of the rounds."""
        return Rounds(*(column[chosen_N] for column in self))

    def reached(self, k: int) -> Mask:
        """Whether slot k was drafted and everything before it accepted."""
        return (self.accepted_N >= k) & (self.drafted_N > k)


def table(records: Sequence[RoundRecord], slots: int) -> Rounds:
    """The full ones of some rounds."""
    whole = [record for record in records if record.full and record.confidence]
    confidence_NK = np.full((len(whole), slots), np.nan)
    for row, record in zip(confidence_NK, whole, strict=True):
        row[: len(record.confidence)] = record.confidence[:slots]
    accepted_N = np.array([record.accepted for record in whole], dtype=np.float64)
    drafted_N = np.array([min(len(record.confidence), slots) for record in whole], dtype=float)
    return Rounds(confidence_NK, accepted_N, drafted_N, np.array([record.request_id for record in whole], dtype=int))


def fit(records: Sequence[RoundRecord], slots: int, held_out: Sequence[RoundRecord]) -> Fit:
    """Calibrate slot after slot, scored on `held_out`. Raises UserError for too few rounds.

    A temperature alone cannot say "too confident at every level", so each slot has a shift too, both by maximum
    likelihood of the slot's own outcomes given that it was reached; `temperature_only` holds the paper's. A curve on
    the product is kept where it foretells texts that it was not fitted on better than slopes alone.
    """
    rounds = table(records, slots)
    for k in range(slots):
        count = int(rounds.reached(k).sum())
        if count < LEAST_ROUNDS:
            raise UserError(
                f"{count} rounds reached slot {k + 1} of {slots}, a fit needs {LEAST_ROUNDS}; pass more prompts"
            )
    made = bend(straight(rounds), rounds) if curve_pays(rounds) else straight(rounds)
    seen, identity = table(held_out, slots), Fit.identity(slots)
    temperatures = sequential_temperatures(rounds)
    paper = Fit(tuple((1.0 / temperatures).tolist()), (0.0,) * slots, ())
    scores: dict[str, Any] = {
        "before": survival_scores(seen, identity),
        "after": survival_scores(seen, made),
        "temperature_only": temperatures.tolist(),
        "temperature_only_after": survival_scores(seen, paper),
        "floor": {"ece": floor(seen, made)},
    }
    rates = [float((rounds.accepted_N > k).sum() / rounds.reached(k).sum()) for k in range(slots)]
    return replace(made, acceptance=tuple(rates), rounds=len(rounds.accepted_N), scores=scores)


def straight(rounds: Rounds) -> Fit:
    """Slope and shift of every slot."""
    weights = []
    for k in range(rounds.confidence_NK.shape[1]):
        reached = rounds.reached(k)
        weights.append(
            logistic(logit(rounds.confidence_NK[reached, k]), (rounds.accepted_N[reached] > k).astype(float))
        )
    slope, shift = zip(*weights, strict=True)
    return Fit(slope, shift, ())


def bend(made: Fit, rounds: Rounds) -> Fit:
    """The fit with a curve at every slot: the share of accepted prefixes by their product, made never falling."""
    product_NK, grid_G = survival_of(rounds, made), np.linspace(0.0, 1.0, POINTS)
    curve = []
    for k in range(product_NK.shape[1]):
        there = rounds.drafted_N > k
        order = np.argsort(product_NK[there, k], kind="stable")
        said_N, was_N = product_NK[there, k][order], (rounds.accepted_N[there] > k).astype(float)[order]
        values = np.interp(grid_G, said_N, never_falling_means(was_N))
        curve.append(tuple(np.round(values, 4).tolist()))
    return replace(made, curve=tuple(curve))


def curve_pays(rounds: Rounds) -> bool:
    """Whether, fitted on half of the texts, a curve foretells the other half better than none, both ways together."""
    gain = 0.0
    for half in (0, 1):
        fitted, other = rounds.of(rounds.text_N % 2 == half), rounds.of(rounds.text_N % 2 != half)
        if not len(fitted.accepted_N) or not len(other.accepted_N):
            return False
        made = straight(fitted)
        gain += brier(other, made) - brier(other, bend(made, fitted))
    return gain > 0


def never_falling_means(values_N: Array) -> Array:
    """The never falling sequence nearest to `values_N` by squares: neighbours that fall are pooled."""
    blocks: list[tuple[float, int]] = []
    for value in values_N.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] >= mean:
            before, more = blocks.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def sequential_temperatures(rounds: Rounds) -> Array:
    """For k = 1..K, the earlier ones fixed: the T_k of a grid whose cumulative product has the least ECE."""
    product_N = np.ones(len(rounds.accepted_N))
    chosen = []
    for k in range(rounds.confidence_NK.shape[1]):
        there = rounds.drafted_N > k
        z_N, outcome = logit(rounds.confidence_NK[:, k]), torch.from_numpy((rounds.accepted_N > k)[there])
        errors = [
            expected_calibration_error(torch.from_numpy((product_N * sigmoid(z_N / t))[there]), outcome)
            for t in TEMPERATURES
        ]
        chosen.append(TEMPERATURES[int(np.argmin(errors))])
        product_N = product_N * sigmoid(z_N / chosen[-1])
    return np.array(chosen)


def logistic(z_N: Array, accepted_N: Array) -> tuple[float, float]:
    """(slope, shift) of σ(slope · z + shift) by maximum likelihood, drawn a little towards (1, 0)."""
    weight = weigh(np.stack([z_N, np.ones_like(z_N)], 1), accepted_N, np.array([1.0, 0.0]))
    return float(weight[0]), float(weight[1])


def signal(records: Sequence[RoundRecord], prior: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Weights of bias and features over all slots that were reached, drawn a little to `prior`; None without any."""
    rows = [
        ((1.0, *record.features[k]), k < record.accepted)
        for record in records
        for k in range(min(record.accepted + 1, record.verified, len(record.features)))
    ]
    if not rows:
        return None
    feature_NF, accepted_N = np.array([row for row, _ in rows]), np.array([passed for _, passed in rows], dtype=float)
    bias, odds, margin, entropy = weigh(feature_NF, accepted_N, np.array(prior, dtype=float)).tolist()
    return bias, odds, margin, entropy


def resaid(record: RoundRecord, weights: Sequence[float]) -> RoundRecord:
    """A round with the confidences that a signal of other weights would have had."""
    z_K = np.array(record.features) @ np.array(weights[1:]) + weights[0]
    return replace(record, confidence=tuple(sigmoid(z_K).tolist()))


def weigh(feature_NF: Array, accepted_N: Array, prior_F: Array) -> Array:
    """Weights [F] of a logistic regression by Newton's method, with a ridge towards `prior_F`."""
    weight_F = prior_F.copy()
    for _ in range(NEWTON_STEPS):
        p_N = sigmoid(np.clip(feature_NF @ weight_F, -30, 30))
        slope_F = feature_NF.T @ (p_N - accepted_N) + RIDGE * (weight_F - prior_F)
        bend_FF = (feature_NF * (p_N * (1 - p_N))[:, None]).T @ feature_NF + RIDGE * np.eye(len(prior_F))
        move_F = np.linalg.solve(bend_FF, slope_F)
        weight_F -= move_F / max(1.0, float(np.abs(move_F).max()) / 2.0)
        if np.abs(move_F).max() < 1e-9:
            break
    return weight_F


def survival_of(rounds: Rounds, made: Fit) -> Array:
    """Calibrated survival, [N, K]; of no meaning past the draft."""
    return np.asarray(np.cumprod(made.apply(rounds.confidence_NK), axis=1), dtype=np.float64)


def brier(rounds: Rounds, made: Fit) -> float:
    """Squared error of the survival, over all drafted slots."""
    drafted_NK = np.arange(rounds.confidence_NK.shape[1]) < rounds.drafted_N[:, None]
    outcome_NK = np.arange(rounds.confidence_NK.shape[1]) < rounds.accepted_N[:, None]
    return float(np.square(survival_of(rounds, made) - outcome_NK)[drafted_NK].sum())


def floor(rounds: Rounds, made: Fit) -> list[float]:
    """The mean ECE by slot that this survival would show on so many rounds if it were the truth."""
    chance_NK, random = made.apply(rounds.confidence_NK), np.random.default_rng(0)
    runs = []
    for _ in range(FLOOR_RUNS):
        accepted_N = np.cumprod(random.random(chance_NK.shape) < chance_NK, axis=1).sum(1)
        runs.append(survival_scores(rounds._replace(accepted_N=accepted_N), made)["ece"])
    return [float(np.mean([run[k] for run in runs])) for k in range(chance_NK.shape[1])] if len(chance_NK) else []


def survival_scores(rounds: Rounds, made: Fit) -> dict[str, list[Any]]:
    """ECE, AUROC, Brier and the reliability diagram of the cumulative survival at every slot."""
    survival_NK = survival_of(rounds, made)
    scores: dict[str, list[Any]] = {"ece": [], "auroc": [], "brier": [], "samples": [], "bins": []}
    for k in range(survival_NK.shape[1]):
        there = rounds.drafted_N > k
        found = reliability(torch.from_numpy(survival_NK[there, k]), torch.from_numpy(rounds.accepted_N[there] > k))
        for name in ("ece", "auroc", "brier", "samples"):
            scores[name].append(getattr(found, name))
        scores["bins"].append([[bin.mean, bin.accepted, bin.count] for bin in found.bins])
    return scores
