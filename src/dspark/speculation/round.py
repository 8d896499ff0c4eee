"""What a planner is told about a round before its draft exists, and what came of it afterwards.

R requests, K draft slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark.common.sampling_params import SamplingParams

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """The requests that get a token this step. Everything here is older than any token of the round's draft."""

    limit_R: Sequence[int]  # drafts that fit; when the plan is asked for: that were drafted
    asked_R: Sequence[int] = ()  # slots that `Planner.slots` gave; empty before
    request_ids: Sequence[int] = ()
    context_R: Sequence[int] = ()  # tokens in the pages
    params_R: Sequence[SamplingParams] = ()
    prefill_rows: int = 0  # rows of the step's forward that are neither anchors nor drafts

    @property
    def requests(self) -> int:
        """R."""
        return len(self.limit_R)

    @functools.cached_property
    def context(self) -> int:
        """Tokens in the pages of all requests together."""
        return sum(self.context_R)

    def without_prefill(self) -> Round:
        """The same requests in a step that takes in no prompt.

        A prompt costs the same whatever is drafted beside it, so what drafting is worth is weighed without it.
        """
        if not self.prefill_rows:
            return self
        return Round(self.limit_R, self.asked_R, self.request_ids, self.context_R, self.params_R)

    def drafted(self, limit_R: Sequence[int], asked_R: Sequence[int], order: Sequence[int] | None = None) -> Round:
        """The same round once its draft exists; `order` permutes what is known of the requests."""
        if order is None:
            return Round(limit_R, asked_R, self.request_ids, self.context_R, self.params_R, self.prefill_rows)
        ids, context = (
            [values[i] for i in order] if values else values for values in (self.request_ids, self.context_R)
        )
        params = [self.params_R[i] for i in order] if self.params_R else ()
        return Round(limit_R, asked_R, ids, context, params, self.prefill_rows)


@dataclass(frozen=True)
class Outcome:
    """A finished round: what was planned and what the target accepted. It may shape later rounds, never its own."""

    round: Round  # as it was when the plan was asked for
    plan: Sequence[int]
    accepted_R: Sequence[int]
    seconds: float  # of the whole step
    survival_RK: Array | None = field(default=None, repr=False)  # as the planner got it; None if it got none
    unread: bool = False  # drafts were verified whole, without a look at their confidences
    rest_steps: int = 0  # above 0: not one step but so many at once, for which the planner was not asked
    bare_seconds: float = 0.0  # of those of them that took in no prompt
    bare_steps: int = 0

    @property
    def drafting(self) -> bool:
        """Whether anybody drafted."""
        return self.unread or self.survival_RK is not None


def as_array(survival_RK: object) -> Array:
    """Survival as float64 on the host; what is not a number survives never."""
    # fmax takes the other where one is no number
    return np.asarray(np.fmax(np.asarray(survival_RK, dtype=np.float64), 0.0))
