"""What a token of each request is worth to a planner: its priority, and more while it is below its promised speed.

R requests.
"""

from __future__ import annotations

import numpy as np

from dspark.speculation.round import Array, Outcome, Round

RAISE = 0.1  # of the logarithm of worth, a step at half the promised speed or less
MOST = 1e4
MEMORY = 0.9  # of a request's tokens and seconds, per step


class _Floor:
    """A request's promised speed, how fast it is, and the factor on its worth that shall bring it there."""

    __slots__ = ("factor", "promised", "seconds", "tokens")

    def __init__(self, promised: float):
        self.promised, self.factor = promised, 1.0
        self.tokens = self.seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """One step; the factor follows the relative shortfall, as the multiplier of a constraint does."""
        self.tokens = MEMORY * self.tokens + tokens
        self.seconds = MEMORY * self.seconds + seconds
        short = 1.0 - self.tokens / (self.promised * self.seconds)
        self.factor = min(max(self.factor * float(np.exp(RAISE * max(min(2 * short, 1.0), -1.0))), 1.0), MOST)


class Worth:
    """Weights of the requests' tokens in a plan's sum."""

    def __init__(self) -> None:
        self.floors: dict[int, _Floor] = {}  # by request
        self.alike = True  # whether a token was worth the same in every request that was last asked about
        self._for: object = None
        self._weight_R = np.ones(0)

    def of(self, round: Round) -> Array:
        """[R]."""
        if not round.params_R:
            return np.ones(round.requests)
        if self._for != round.request_ids or self.floors:
            self._for = round.request_ids
            priorities = [params.priority for params in round.params_R]
            self._follow(round)
            self.alike = not self.floors and priorities.count(1.0) == len(priorities)
            self._weight_R = np.array(priorities)
            if self.floors:
                self._weight_R *= [self.floors[i].factor if i in self.floors else 1.0 for i in round.request_ids]
        return self._weight_R

    def observe(self, outcome: Outcome) -> None:
        """Hold what each request with a promise got against it."""
        for request, accepted in zip(outcome.round.request_ids, outcome.accepted_R, strict=True):
            if request in self.floors:
                self.floors[request].observe(1 + accepted, outcome.seconds)

    def _follow(self, round: Round) -> None:
        promised = [params.min_tokens_per_second for params in round.params_R]
        if promised.count(None) == len(promised):
            self.floors = {}
            return
        pairs = zip(round.request_ids, promised, strict=True)
        self.floors = {i: self.floors.get(i) or _Floor(floor) for i, floor in pairs if floor is not None}
