"""By what factor the odds of acceptance of single requests differ from those of their like.

N requests' rounds, R requests, C requests remembered; row 0 stands for those nothing is known of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.speculation.round import Array

OWN_MEMORY = 0.95  # of a request's tokens, per round of its
PRIOR = 12.0  # drafted tokens that the odds of its like count for
FORGET_AFTER = 4096  # requests remembered before those not seen lately are dropped


class Odds:
    """Accepted and rejected tokens of requests, forgetting, beside what the odds of their like predict."""

    def __init__(self) -> None:
        self._row: dict[int, int] = {}
        self._count_C3 = np.zeros((1, 3))  # accepted, rejected, expected
        self._heard_C = np.zeros(1, dtype=np.int64)  # when last
        self._clock = 0

    def add(self, requests: Sequence[int], round_N3: Array, counts_N: NDArray[np.bool_]) -> None:
        """Rounds in their order, each of its request, where it `counts`: a round forgets a share of those before it."""
        row_N = np.array(list(map(self._row_of, requests)))[counts_N]
        order_N = np.argsort(row_N, kind="stable")
        row_N, round_N3 = row_N[order_N], round_N3[counts_N][order_N]
        if not len(row_N):
            return
        first_N = np.flatnonzero(np.append(True, row_N[1:] != row_N[:-1]))  # of each request
        rounds_N = np.diff(np.append(first_N, len(row_N)))
        later_N = np.repeat(first_N + rounds_N, rounds_N) - 1 - np.arange(len(row_N))
        fresh_N3 = np.add.reduceat(round_N3 * (OWN_MEMORY**later_N)[:, None], first_N, axis=0)
        row_N = row_N[first_N]
        self._count_C3[row_N] = self._count_C3[row_N] * (OWN_MEMORY**rounds_N)[:, None] + fresh_N3
        self._clock += 1
        self._heard_C[row_N] = self._clock
        if len(self._row) > FORGET_AFTER:
            self._forget()

    def factors(self, requests: Sequence[int]) -> Array:
        """Their odds over those of their like, drawn towards 1."""
        row = self._row
        yes_R, no_R, expected_R = self._count_C3[[row.get(request, 0) for request in requests]].T
        mean_R = expected_R / np.maximum(yes_R + no_R, 1e-9)
        mean_R[yes_R + no_R == 0.0] = 0.5
        mean_R = np.minimum(np.maximum(mean_R, 1e-4), 1 - 1e-4)
        odds_R = mean_R / (1 - mean_R)
        return np.asarray((yes_R + PRIOR * mean_R) / (no_R + PRIOR * (1 - mean_R)) / odds_R)

    def _row_of(self, request: int) -> int:
        row = self._row.get(request)
        if row is None:
            row = self._row[request] = 1 + len(self._row)
            if row == len(self._count_C3):
                self._count_C3 = np.concatenate([self._count_C3, np.zeros_like(self._count_C3)])
                self._heard_C = np.concatenate([self._heard_C, np.zeros_like(self._heard_C)])
        return row

    def _forget(self) -> None:
        """Drop all but those heard of last."""
        kept = sorted(self._row, key=lambda request: -self._heard_C[self._row[request]])[: FORGET_AFTER // 2]
        row_C = np.array([0, *(self._row[request] for request in kept)])
        self._count_C3, self._heard_C = self._count_C3[row_C], self._heard_C[row_C]
        self._row = {request: 1 + place for place, request in enumerate(kept)}
