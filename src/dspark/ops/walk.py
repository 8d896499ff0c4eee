"""Which drafted tokens of a round are verified, slot by slot over all requests, where the step's price has cliffs.

R requests, K draft slots, A requests still in the walk, J slots from the present one on, N rows that could be admitted.
Plans are made on the host, so these are its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.ops.cpu import load_kernels

Array = NDArray[np.float64]


def walk(
    value_RK: Array,
    limit_R: Sequence[int],
    asked_R: Sequence[int],
    ahead_KK: Array,
    seconds_N1: Array,
    *,
    committed: float = 0.0,
    rate: float | None = None,
) -> list[int]:
    """Admit slot by slot, for as long as the best set that holds the present slots is worth more than stopping.

    `value_RK` is survival (times what the request's tokens are worth), never rising along K; `ahead_KK[k, j]` the
    expected survival of slot j over that of slot k, at most 1. n admitted rows of values v are worth
    (committed + Σ v) / seconds_N1[n], or with a `rate` Σ v - rate · seconds_N1[n]. The best n may lie past any cliff,
    for slots to come stand in with their expectation. Ties go to the present slots, in the order of the requests.

    At slot k, `value_RK` is read only for requests whose slots before k are admitted. How many slots a drafter that
    stops early has drafted (`limit_R`) tells about their tokens, so what lies beyond reaches to `asked_R`.
    """
    if not load_kernels():
        return walk_plain(value_RK, limit_R, asked_R, ahead_KK, seconds_N1, committed=committed, rate=rate)
    arrays = [torch.from_numpy(array) for array in (value_RK, ahead_KK, seconds_N1)]
    length_R: torch.Tensor = torch.ops.dspark.walk.default(*arrays, limit_R, asked_R, committed, rate)
    return length_R.tolist()


def walk_plain(
    value_RK: Array,
    limit_R: Sequence[int],
    asked_R: Sequence[int],
    ahead_KK: Array,
    seconds_N1: Array,
    *,
    committed: float = 0.0,
    rate: float | None = None,
) -> list[int]:
    """The specification of the kernel, bit for bit."""
    slots = value_RK.shape[1]
    limit, asked = np.asarray(limit_R), np.asarray(asked_R)
    length_R = np.zeros(len(value_RK), dtype=np.int64)
    alive_A = np.arange(len(value_RK))
    gain, admitted = 0.0, 0
    for k in range(slots):
        alive_A = alive_A[limit[alive_A] > k]
        if not len(alive_A):
            break
        now_A = value_RK[alive_A, k]
        beyond_AJ = now_A[:, None] * ahead_KK[k, k:]
        falling_N = np.sort(beyond_AJ[np.arange(k, slots) < asked[alive_A, None]])[::-1]
        gain_N1 = gain + np.cumsum(np.append(0.0, falling_N))
        price_N1 = seconds_N1[admitted : admitted + len(gain_N1)]
        worth_N1 = (committed + gain_N1) / price_N1 if rate is None else gain_N1 - rate * price_N1
        best = int(worth_N1.argmax())
        if not best:
            break
        alive_A = alive_A[_among_best(now_A, falling_N, best)]
        length_R[alive_A] = k + 1
        gain += float(np.cumsum(value_RK[alive_A, k])[-1])
        admitted += len(alive_A)
    return length_R.tolist()


def _among_best(now_A: Array, falling_N: Array, best: int) -> NDArray[np.bool_]:
    """Whose present slot is among the `best` largest values; there is always one, for no later slot is worth more."""
    bound = falling_N[best - 1]
    tied_A = now_A == bound
    tied_A &= np.cumsum(tied_A) <= best - np.count_nonzero(falling_N[:best] > bound)
    return (now_A > bound) | tied_A
