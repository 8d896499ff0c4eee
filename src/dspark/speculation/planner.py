"""Planners choose how many tokens each request drafts, and how many of those the target verifies.

R requests, K draft slots. A plan is lossless only if it never looks at the token it decides about: whether slot k is
verified may depend on the tokens before slot k and on anything older (non-anticipation, docs/guides/planning.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark.common.errors import UserError
from dspark.speculation.acceptance import Acceptance, First
from dspark.speculation.cost import StepCost
from dspark.speculation.joint import Joint
from dspark.speculation.prices import Prices, Source
from dspark.speculation.round import Array, Outcome, Round, as_array
from dspark.speculation.scheduled import Greedy, Lagged, Lookahead


class Planner(Protocol):
    """Asked twice a step, before drafting for the slots and after it for the plan; then told what came of it."""

    def slots(self, round: Round) -> list[int]:
        """How many tokens each request drafts, 0..limit_r; 0 for a request that need not draft at all."""
        ...

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        """How many drafted tokens of each request are verified, 0..limit_r.

        `survival_RK` is the cumulative product of the (calibrated) confidences, None without a draft; the round's
        `limit_R` is what each request really drafted, within its context and its remaining tokens.
        """
        ...

    def observe(self, outcome: Outcome) -> None:
        """Learn from a finished round; what is learnt may shape later rounds."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The first `length` drafted tokens of every request, always; 0 is no speculation."""

    length: int
    reads_confidence, takes_all = False, True

    @property
    def rest(self) -> int:
        """For ever, where nothing is drafted."""
        return 0 if self.length else sys.maxsize

    def slots(self, round: Round) -> list[int]:
        return [min(self.length, limit) for limit in round.limit_R]

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        return self.slots(round)

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""


class Full:
    """Everything that was drafted."""

    reads_confidence, takes_all = False, True

    def slots(self, round: Round) -> list[int]:
        return list(round.limit_R)

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        return list(round.limit_R)

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Threshold:
    """The longest prefix in which every confidence is at least `confidence`. (DSpark, §5: static threshold)

    The confidence of slot k depends on the tokens before k only, so stopping at the first low one is lossless.
    """

    confidence: float

    def slots(self, round: Round) -> list[int]:
        return list(round.limit_R)

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        if survival_RK is None:
            return [0] * round.requests
        rows = as_array(survival_RK).tolist()
        return [self._prefix(row, limit) for row, limit in zip(rows, round.limit_R, strict=True)]

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def _prefix(self, survival: Sequence[float], limit: int) -> int:
        before = 1.0
        for k, now in enumerate(survival[:limit]):
            # survival is a product of rounded factors: without the slack a confidence equal to the bound could fail
            if not now >= self.confidence * before * (1 - 1e-6):
                return k
            before = now
        return limit


PLANNERS: dict[str, Callable[[str], Planner]] = {
    "none": lambda _: Fixed(0),
    "full": lambda _: Full(),
    "fixed": lambda text: Fixed(_length(text)),
    "threshold": lambda text: Threshold(_confidence(text)),
}
PRICED: dict[str, Callable[[Prices, First | None], Planner]] = {
    "greedy": lambda prices, _: Greedy(prices),
    "lagged": lambda prices, _: Lagged(prices),
    "lookahead": lambda prices, _: Lookahead(prices),
    "joint": lambda prices, first: Joint(prices, Acceptance(first)),
}
AUTO = "auto"  # the engine's choice among these
DEFAULT = AUTO  # of engines and commands
_TAKES = {"fixed": "a number of tokens, as in fixed:3", "threshold": "a confidence, as in threshold:0.5"}
NAMES = f"{AUTO}, none, full, fixed:N, threshold:C, " + ", ".join(PRICED)


def needs_cost(text: str) -> bool:
    """Whether the planner of this name weighs what a step costs."""
    return text.partition(":")[0] in PRICED


def check_planner(text: str) -> None:
    """Raises UserError for a name that no planner has, or an argument that it does not take; "auto" is a name."""
    name, _, argument = text.partition(":")
    if text == AUTO:
        return
    if name not in PLANNERS and name not in PRICED:
        raise UserError(f"planner {text!r} is unknown; pass one of {NAMES}")
    if bool(argument) != (name in _TAKES):
        way_out = f"needs {_TAKES[name]}" if name in _TAKES else f"takes no argument; pass {name}"
        raise UserError(f"planner {text!r} {way_out}")
    if name in PLANNERS:
        PLANNERS[name](argument)


def parse_planner(text: str, cost: StepCost | Source | None = None, first: First | None = None) -> Planner:
    """The planner a person names, such as "fixed:3" or "greedy"; else a UserError. Priced ones need the step's cost.

    `first` is the guess, before any outcome, of what each slot's acceptance is, for those that decide who drafts.
    """
    check_planner(text)
    name, _, argument = text.partition(":")
    if name in PLANNERS:
        return PLANNERS[name](argument)
    if name == AUTO:
        raise UserError("planner auto is chosen by an engine; name one of " + NAMES.removeprefix(f"{AUTO}, "))
    if cost is None:
        raise UserError(f"planner {name} weighs what a step costs; pass a profile, or one of none, full, fixed:N")
    return PRICED[name](Prices(cost), first)


def _length(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"planner fixed:{text} is not a number of tokens, 0 or more; pass for example fixed:3")
    return int(text)


def _confidence(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise UserError(f"planner threshold:{text} is not a confidence from 0 to 1; pass for example threshold:0.5")
    return value
