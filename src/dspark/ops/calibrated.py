"""Confidences made probabilities: a line on their logits, a curve on their product, and a second line, by circle.

R requests, K draft slots, C circles of requests, curves [K, G] of G points each. Plans are made on the host, so these
are its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.ops.cpu import load_kernels

Array = NDArray[np.float64]
LEAST = 6e-6  # a confidence nearer to 0 or 1 counts as this


def calibrated(
    raw_RK: Array,
    place_R: Sequence[int],
    first_C2K: Array,
    then_C2K: Array,
    curved_C: Sequence[int],
    curves: Sequence[Array],
) -> tuple[Array, Array]:
    """Logits after line and curve of each request's circle, and the confidences after the second line: [R, K] each.

    Lines are slope and shift by slot. `curved_C` says which curve a circle has, -1 for none.
    """
    if not load_kernels():
        return calibrated_plain(raw_RK, place_R, first_C2K, then_C2K, curved_C, curves)
    raw, first, then, *bends = map(torch.from_numpy, (raw_RK, first_C2K, then_C2K, *curves))
    z_RK, said_RK = torch.ops.dspark.calibrated.default(raw, place_R, first, then, curved_C, bends, LEAST)
    return z_RK.numpy(), said_RK.numpy()


def calibrated_plain(
    raw_RK: Array,
    place_R: Sequence[int],
    first_C2K: Array,
    then_C2K: Array,
    curved_C: Sequence[int],
    curves: Sequence[Array],
) -> tuple[Array, Array]:
    """The specification of the kernel, to rounding."""
    place, slots = np.asarray(place_R), raw_RK.shape[1]
    z_RK = logit(raw_RK) * first_C2K[place, 0, :slots] + first_C2K[place, 1, :slots]
    for curve in set(curved_C) - {-1}:
        rows = np.flatnonzero(np.asarray(curved_C)[place] == curve)
        z_RK[rows] = logit(bent(sigmoid(z_RK[rows]), curves[curve]))
    return z_RK, sigmoid(z_RK * then_C2K[place, 0, :slots] + then_C2K[place, 1, :slots])


def logit(confidence: Array) -> Array:
    """log(c / (1 - c)), within about ±12; what is not a number counts as never."""
    c = np.fmin(np.fmax(confidence, LEAST), 1.0 - LEAST)  # fmax takes the number where the other is none
    return np.log(c / (1.0 - c))


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + np.exp(-z))


def bent(confidence_RK: Array, curve_KG: Array) -> Array:
    """Confidences whose product at every slot is the curve of what it was, never more than at the slot before."""
    slots, points = confidence_RK.shape[1], curve_KG.shape[1]
    along_RK = np.multiply.accumulate(confidence_RK, axis=1) * (points - 1)
    cell_RK = np.minimum(along_RK.astype(np.intp), points - 2)
    along_RK -= cell_RK
    cell_RK += np.arange(0, slots * points, points)
    low_RK, high_RK = curve_KG.take(cell_RK), curve_KG.take(cell_RK + 1)
    survival_RK = np.minimum.accumulate(low_RK + (high_RK - low_RK) * along_RK, axis=1)
    before_RK = np.ones_like(survival_RK)
    np.maximum(survival_RK[:, :-1], LEAST, out=before_RK[:, 1:])
    return np.asarray(survival_RK / before_RK, dtype=np.float64)
