"""What speculation did and was expected to do, in sums that only grow: cheap to keep in every step, read now and then.

R requests of a step, K draft slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.round import Array

BUDGETS = 12  # sizes of a step's verify budget: 0, 1, 2–3, 4–7, ... and the last without a bound


@dataclass
class Ledger:
    """Of the steps in which somebody could have drafted."""

    drafting_steps: int = 0
    resting_steps: int = 0  # the planner let nobody draft
    resting: bool = False  # ... in the newest step
    audited: int = 0  # requests' rounds that were verified in full to learn from
    expected: float = 0.0  # accepted tokens, as the confidences had it
    realised: int = 0  # accepted tokens of the same rounds
    verified: int = 0
    budgets: list[int] = field(default_factory=lambda: [0] * BUDGETS)  # drafting steps by bits of their verified tokens

    def draft(
        self, survival_RK: Array | None, plan: Sequence[int], accepted_R: Sequence[int], *, audited: int = 0
    ) -> None:
        """A step with a draft: the expectation of a plan of ℓ tokens is the sum of its first ℓ survivals.

        Steps whose survivals nobody read count neither as expected nor as realised.
        """
        self.resting = False
        self.drafting_steps += 1
        self.audited += audited
        budget = sum(plan)
        self.verified += budget
        self.budgets[min(budget.bit_length(), BUDGETS - 1)] += 1
        if survival_RK is None:
            return
        if len(plan) == 1:  # the step is short
            expected = sum(survival_RK[0].tolist()[:budget])
        else:
            expected = float((survival_RK * (np.arange(survival_RK.shape[1]) < np.asarray(plan)[:, None])).sum())
        if expected == expected:  # a planner that reads no confidences may get none, as numbers that are no numbers
            self.expected += expected
            self.realised += sum(accepted_R)

    def rest(self) -> None:
        """A step in which the planner let nobody draft."""
        self.resting = True
        self.resting_steps += 1


@dataclass
class Priced:
    """Steps held against their price, as it was before they taught it anything."""

    steps: int = 0
    predicted: float = 0.0  # s
    measured: float = 0.0  # s
    error: float = 0.0  # s, without their signs
    spent: float = 0.0  # s, of steps without prefill
    plain: float = 0.0  # s that their tokens would have cost without speculation, by the price of plain steps

    def observe(self, step: StepTime, cost: StepCost) -> None:
        """Take one step. One that drafted nothing is its own plain step."""
        predicted = sum(cost.of_step(step))
        self.steps += 1
        self.predicted += predicted
        self.measured += step.seconds
        self.error += abs(step.seconds - predicted)
        if step.prefill or not step.committed or not step.requests:
            return
        self.spent += step.seconds
        if step.drafting:
            alone = StepTime(step.requests, step.requests, step.context, 0, 0, 0, 0.0, 0.0)
            self.plain += cost.of_step(alone)[0] * step.committed / step.requests
        else:
            self.plain += step.seconds
