"""Finished rounds of requests, one below the other, as `Acceptance` learns from them.

R requests of a step, N requests' rounds, K draft slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.speculation.circles import Circle, circles_of, names_of
from dspark.speculation.round import Array, Outcome

HEARD = 256, 4  # requests' rounds that are learnt from at once, in at least so many steps


def enough(requests: int) -> int:
    """The newest steps of so many requests that are learnt from at once."""
    return max(HEARD[0] // max(requests, 1), HEARD[1])


class Finished:
    """Columns of length N. Where a round's survival is None all that was drafted was verified."""

    def __init__(self) -> None:
        self.request: list[int] = []  # where none is known, one that no request has
        self.circle: list[Circle] = []
        self.limit: list[int] = []  # drafted
        self.plan: list[int] = []
        self.accepted: list[int] = []
        self.survivals: list[tuple[int, Array]] = []  # from which round on, [R, K]

    def __len__(self) -> int:
        return len(self.plan)

    @staticmethod
    def of(outcomes: Sequence[Outcome], before: Sequence[Finished] = ()) -> Finished:
        """The rounds of steps in which somebody drafted, behind those of `before`, which were verified whole."""
        made = Finished()
        for one in before:
            made.add_whole(one.request, one.circle, one.plan, one.accepted)
        for outcome in outcomes:
            if outcome.drafting:
                made.add(outcome)
        return made

    def add(self, outcome: Outcome) -> None:
        """The rounds of one more step."""
        round = outcome.round
        if outcome.survival_RK is not None:
            self.survivals.append((len(self), outcome.survival_RK))
        self.request += names_of(round)
        self.circle += circles_of(round)
        self.limit += round.limit_R
        self.plan += outcome.plan
        self.accepted += outcome.accepted_R

    def add_whole(
        self, requests: Sequence[int], circles: Sequence[Circle], plan: list[int], accepted: list[int]
    ) -> None:
        """The rounds of one more step, in which every draft was verified whole."""
        self.request += requests
        self.circle += circles
        self.limit += plan
        self.plan += plan
        self.accepted += accepted

    def filled_in(self) -> tuple[Array, Array]:
        """How far each slot was reached and passed, [N, K]: 0 or 1 where the target said, else as survival has it."""
        slots = max([max(self.limit), *(a_RK.shape[1] for _, a_RK in self.survivals)])
        slot_K = np.arange(slots)
        plan_N1, accepted_N1, limit_N1 = np.array([self.plan, self.accepted, self.limit])[:, :, None]
        passed_NK = slot_K < np.minimum(accepted_N1, plan_N1)
        if self.survivals:
            passed_NK = np.where(slot_K < plan_N1, passed_NK, self._beyond(slots, plan_N1, accepted_N1))
        drafted_NK = slot_K < limit_N1
        passed_NK = passed_NK * drafted_NK * 1.0
        reached_NK = np.concatenate([np.ones((len(self), 1)), passed_NK[:, :-1]], 1) * drafted_NK
        return reached_NK, passed_NK

    def _beyond(self, slots: int, plan_N1: Array, accepted_N1: Array) -> Array:
        """What survival says of slots that the plan cut off, where all before them were accepted."""
        a_NK = np.zeros((len(self), slots))
        for first, a_RK in self.survivals:
            a_NK[first : first + len(a_RK), : a_RK.shape[1]] = a_RK
        before_N1 = np.take_along_axis(a_NK, np.maximum(plan_N1 - 1, 0), 1)
        given_NK = a_NK / np.where(plan_N1 > 0, np.maximum(before_N1, 1e-9), 1.0)
        return np.asarray(np.minimum(given_NK * (accepted_N1 == plan_N1), 1.0))


@dataclass(frozen=True)
class Followed:
    """Steps on end that an engine did by a standing choice, every draft verified whole and unread."""

    steps: int
    seconds: float  # of all of them
    requests: int  # of the last
    finished: Finished  # of the newest steps
    last: Sequence[Outcome]  # the newest steps that can be held against their prices
