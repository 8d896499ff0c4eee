"""What a step costs as a planner asks: by tokens verified, with the load it has now, remembered while that is alike.

N drafted tokens verified in a step.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np

from dspark.speculation.cost import StepCost
from dspark.speculation.round import Array, Round

REMEMBERED = 256
STEP = 1.25  # prices are made for loads that differ by this factor or more in context or prefill
LOG_STEP = math.log(STEP)


class Source(Protocol):
    """Whatever holds the cost of the day; a new object where it changed."""

    @property
    def cost(self) -> StepCost: ...


class Prices:
    """Seconds of steps under a `StepCost`, or under what a source such as `LiveCost` now holds for true."""

    def __init__(self, cost: StepCost | Source):
        self._source = None if isinstance(cost, StepCost) else cost
        self._cost = cost if isinstance(cost, StepCost) else cost.cost
        self._tables: dict[tuple[int, ...], Array] = {}

    @property
    def cost(self) -> StepCost:
        """The cost that prices come from."""
        if self._source is not None and self._source.cost is not self._cost:
            self._cost = self._source.cost
            self._tables.clear()
        return self._cost

    def verifying(self, round: Round, most: int) -> Array:
        """Seconds of the step's forward when n drafted tokens are verified, for n = 0..`most`: [most + 1]."""
        requests, prefill, context = round.requests, _rounded(round.prefill_rows), _rounded(round.context)
        cost, table = self.cost, self._tables.get((requests, prefill, context))
        if table is None or len(table) <= most:
            if len(self._tables) >= REMEMBERED:
                self._tables.clear()
            rows = requests + np.arange(max(most, 8) + 1)
            table = cost.target(rows, requests=requests, context=context, prefill=prefill)
            self._tables[requests, prefill, context] = table
        return table[: most + 1]

    def drafts(self, round: Round, most: int) -> Array:
        """Seconds to draft n = 0..`most` slots for m = 0..R of the round's requests: [R + 1, most + 1]."""
        requests, context = round.requests, _rounded(round.context)
        cost, table = self.cost, self._tables.get((requests, context))
        if table is None or table.shape[1] <= most:
            drafting = np.arange(requests + 1)[:, None]
            share = context * drafting / max(requests, 1)
            table = cost.draft(drafting, np.arange(most + 1), context=share)
            self._tables[requests, context] = table
        return table[:, : most + 1]

    def drafting(self, round: Round, slots: int, requests: int) -> float:
        """Seconds to draft `slots` tokens for `requests` of the round's requests."""
        return float(self.drafts(round, slots)[requests, slots])


@functools.lru_cache(1 << 14)
def _rounded(tokens: int) -> int:
    """A count of tokens, or one near it that stands for all alike."""
    return tokens if tokens < 16 else round(16 * STEP ** round(math.log(tokens / 16) / LOG_STEP))
