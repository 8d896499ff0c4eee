"""What a step costs as a planner asks: by tokens verified, with the load it has now, remembered while that is alike.

N drafted tokens verified in a step.
"""

from __future__ import annotations

import numpy as np

from dspark.speculation.cost import StepCost
from dspark.speculation.round import Array, Round

REMEMBERED = 256
STEP = 1.25  # prices are made for loads that differ by this factor or more in context or prefill


class Prices:
    """Seconds of steps under a `StepCost`."""

    def __init__(self, cost: StepCost):
        self.cost = cost
        self._tables: dict[tuple[int, ...], Array] = {}

    def verifying(self, round: Round, most: int) -> Array:
        """Seconds of the step's forward when n drafted tokens are verified, for n = 0..`most`: [most + 1]."""
        requests, prefill, context = round.requests, _rounded(round.prefill_rows), _rounded(round.context)
        table = self._tables.get((requests, prefill, context))
        if table is None or len(table) <= most:
            if len(self._tables) >= REMEMBERED:
                self._tables.clear()
            rows = requests + np.arange(max(most, 8) + 1)
            table = self.cost.target(rows, requests=requests, context=context, prefill=prefill)
            self._tables[requests, prefill, context] = table
        return table[: most + 1]

    def drafting(self, round: Round, slots: int, requests: int) -> float:
        """Seconds to draft `slots` tokens for `requests` of the round's requests."""
        if not slots or not requests:
            return 0.0
        key = (-1, requests, slots, _rounded(round.context * requests // round.requests))
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = np.atleast_1d(self.cost.draft(requests, slots, context=key[-1]))
        return float(table[0])


def _rounded(tokens: int) -> int:
    """A count of tokens, or one near it that stands for all alike."""
    return tokens if tokens < 16 else round(16 * STEP ** round(np.log(tokens / 16) / np.log(STEP)))
