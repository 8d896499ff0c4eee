"""The guard: what steps really take, with drafting and without, beside what they were priced at.

A planner that compares speculating with not speculating compares two prices; an error of a fifth in either makes it
lose. So each side is held against its own steps, by number of requests, and tried now and then where it is not taken.
"""

from __future__ import annotations

import math

from dspark.speculation.round import Outcome

FIRST = 3  # steps whose mean is believed before old ones are forgotten
RATE = 0.05  # of a step, once there were many
CLIP = 0.5  # a step further off than this, in logarithms, counts as this far off
TRY_EVERY = 48  # decisions between two plain steps of a planner that always drafts


class Guard:
    """Factors on the seconds of plain and of drafting steps, from the planner's own outcomes."""

    def __init__(self) -> None:
        self._log: dict[tuple[int, bool], tuple[float, int]] = {}  # (size, drafting) -> logarithm, steps
        self._decisions = 0

    def observe(self, outcome: Outcome, price: float, plain_price: float) -> None:
        """Hold a finished step, and the plain ones that passed unasked before it, against their prices."""
        if outcome.round.prefill_rows:
            return
        requests = outcome.round.requests
        if outcome.rest_steps:
            self._learn(requests, False, outcome.rest_seconds / outcome.rest_steps / plain_price)
        self._learn(requests, outcome.survival_RK is not None, outcome.seconds / price)

    def factor(self, requests: int, *, drafting: bool) -> float:
        """What to multiply the seconds of such a step by; that of the other side while this one was never seen."""
        size = _size(requests)
        for key in ((size, drafting), (size, not drafting)):
            if key in self._log:
                return math.exp(self._log[key][0])
        return 1.0

    def try_plain(self, requests: int) -> bool:
        """Whether a planner that is about to draft shall take a plain step first, to know what one takes."""
        self._decisions += 1
        return (_size(requests), False) not in self._log or self._decisions % TRY_EVERY == 0

    def _learn(self, requests: int, drafting: bool, ratio: float) -> None:
        key = (_size(requests), drafting)
        known, steps = self._log.get(key, (math.log(ratio), 0))
        error = min(max(math.log(ratio) - known, -CLIP), CLIP)
        self._log[key] = known + max(RATE, 1.0 / (1 + steps) if steps < FIRST else 0.0) * error, steps + 1


def _size(requests: int) -> int:
    return requests.bit_length()
