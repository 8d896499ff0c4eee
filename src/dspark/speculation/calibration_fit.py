"""Fits calibrations from rounds that were verified in full. (DSpark, §3.2.1: sequential temperature scaling)

N rounds, K draft slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dspark.common.errors import UserError
from dspark.speculation.calibration import Fit, logit, sigmoid
from dspark.speculation.reliability import RoundRecord, expected_calibration_error, reliability
from dspark.speculation.round import Array

TEMPERATURES = np.geomspace(0.2, 5.0, 61)
LEAST_ROUNDS = 100  # that a fit needs at every slot
NEWTON_STEPS = 25
RIDGE = 1.0  # rounds' worth of belief in slope 1 and shift 0


def table(records: Sequence[RoundRecord], slots: int) -> tuple[Array, Array, Array]:
    """Full rounds as arrays: confidences [N, K] (not a number past the draft), accepted [N], drafted [N]."""
    whole = [record for record in records if record.full and record.confidence]
    confidence_NK = np.full((len(whole), slots), np.nan)
    for row, record in zip(confidence_NK, whole, strict=True):
        row[: len(record.confidence)] = record.confidence[:slots]
    accepted_N = np.array([record.accepted for record in whole], dtype=np.float64)
    return confidence_NK, accepted_N, np.array([min(len(record.confidence), slots) for record in whole], dtype=float)


def fit(records: Sequence[RoundRecord], slots: int, held_out: Sequence[RoundRecord]) -> Fit:
    """Calibrate slot after slot, scored on `held_out`. Raises UserError for too few rounds.

    A temperature alone cannot say "too confident at every level", so each slot has a shift too, both by maximum
    likelihood of the slot's own outcomes given that it was reached; `temperature_only` holds the paper's.
    """
    confidence_NK, accepted_N, drafted_N = table(records, slots)
    for k in range(slots):
        count = int(((accepted_N >= k) & (drafted_N > k)).sum())
        if count < LEAST_ROUNDS:
            raise UserError(
                f"{count} rounds reached slot {k + 1} of {slots}, a fit needs {LEAST_ROUNDS}; pass more prompts"
            )
    slope, shift = np.ones(slots), np.zeros(slots)
    for k in range(slots):
        reached = (accepted_N >= k) & (drafted_N > k)
        slope[k], shift[k] = logistic(logit(confidence_NK[reached, k]), (accepted_N[reached] > k).astype(float))
    seen = table(held_out, slots)
    scores: dict[str, Any] = {
        "before": survival_scores(seen, np.ones(slots), np.zeros(slots)),
        "after": survival_scores(seen, slope, shift),
        "temperature_only": sequential_temperatures(confidence_NK, accepted_N, drafted_N).tolist(),
    }
    scores["temperature_only_after"] = survival_scores(
        seen, 1.0 / np.array(scores["temperature_only"]), np.zeros(slots)
    )
    reached_K = [((accepted_N >= k) & (drafted_N > k)).sum() for k in range(slots)]
    passed_K = [(accepted_N > k).sum() for k in range(slots)]
    acceptance = tuple(float(p / r) for p, r in zip(passed_K, reached_K, strict=True))
    return Fit(tuple(slope.tolist()), tuple(shift.tolist()), acceptance, len(accepted_N), scores)


def sequential_temperatures(confidence_NK: Array, accepted_N: Array, drafted_N: Array) -> Array:
    """For k = 1..K, the earlier ones fixed: the T_k of a grid whose cumulative product has the least ECE."""
    product_N = np.ones(len(accepted_N))
    chosen = []
    for k in range(confidence_NK.shape[1]):
        there = drafted_N > k
        z_N, outcome = logit(confidence_NK[:, k]), torch.from_numpy((accepted_N > k)[there])
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


def survival_scores(rounds: tuple[Array, Array, Array], slope_K: Array, shift_K: Array) -> dict[str, list[Any]]:
    """ECE, AUROC, Brier and the reliability diagram of the cumulative survival at every slot."""
    confidence_NK, accepted_N, drafted_N = rounds
    survival_NK = np.cumprod(sigmoid(logit(confidence_NK) * slope_K + shift_K), axis=1)
    scores: dict[str, list[Any]] = {"ece": [], "auroc": [], "brier": [], "samples": [], "bins": []}
    for k in range(len(slope_K)):
        there = drafted_N > k
        found = reliability(torch.from_numpy(survival_NK[there, k]), torch.from_numpy(accepted_N[there] > k))
        for name in ("ece", "auroc", "brier", "samples"):
            scores[name].append(getattr(found, name))
        scores["bins"].append([[bin.mean, bin.accepted, bin.count] for bin in found.bins])
    return scores
