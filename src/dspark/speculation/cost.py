"""The price of a step in seconds: the target's forward by its rows, and the draft by its requests and slots.

All functions take numbers or numpy arrays that broadcast against each other, and give float64 arrays of that shape.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark.common.errors import UserError
from dspark.common.files import replacing_file

Seconds = NDArray[np.float64]
INERT = 1.05  # a step of the most rows that costs less than this times one row's leaves nothing to plan


@dataclass(frozen=True)
class StepTime:
    """What one step of an engine did, and how long it took."""

    rows: int  # with logits: one for each request, and its verified drafts
    requests: int
    context: int  # tokens in the pages of all sequences of the step
    prefill: int  # rows without logits
    drafting: int  # requests that drafted
    slots: int  # drafted for each of them
    draft_seconds: float  # up to the end of the draft; on an asynchronous device only the time to launch it
    seconds: float  # all of it
    committed: int = 0  # tokens


@dataclass(frozen=True)
class StepCost:
    """What one engine step takes, host work included; a table over rows and small linear terms beside it.

    `seconds[i]` is a step of `rows[i]` rows with logits (anchors and verified drafts), without context or requests'
    own share; between two measured row counts the price is interpolated, past the last the last slope goes on.
    A table with every row count in it is any staircase.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_request: float = 0.0  # s for every request that gets tokens: scheduling, sampling, text
    per_context: float = 0.0  # s for every token that lies in the pages of a sequence of the step
    per_attended: float = 0.0  # s for every pair of a row and a token it attends to in the pages
    prefill_weight: float = 1.0  # a row without logits as a share of one with
    draft_requests: tuple[int, ...] = ()
    draft_slots: tuple[int, ...] = ()
    draft_seconds: tuple[tuple[float, ...], ...] = ()  # [draft_requests][draft_slots]; () for a drafter that is free
    draft_per_context: float = 0.0
    stalls: tuple[float, float] = (0.0, 0.0)  # how many a second interrupt the steps, and s of one; in no price above
    outside: float = 0.0  # share of the time that passes between steps; in no price above

    def __post_init__(self) -> None:
        _check_axis("rows", self.rows, len(self.seconds))
        _check_rising("seconds", self.seconds)
        if self.draft_seconds:
            _check_axis("draft_requests", self.draft_requests, len(self.draft_seconds))
            for row in self.draft_seconds:
                _check_axis("draft_slots", self.draft_slots, len(row))
                _check_rising("draft_seconds", row)
            for column in zip(*self.draft_seconds, strict=True):
                _check_rising("draft_seconds", column)
        for name in ("per_request", "per_context", "per_attended", "prefill_weight", "draft_per_context"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"cost: {name} {getattr(self, name)} is not a number from 0 up; measure the profile anew"
                )
        if not (len(self.stalls) == 2 and all(0.0 <= value < float("inf") for value in self.stalls)):
            raise UserError(f"cost: stalls {self.stalls} are not two numbers from 0 up; measure the profile anew")
        if not 0.0 <= self.outside < 1.0:
            raise UserError(f"cost: outside {self.outside} is not a share from 0 to below 1; measure the profile anew")

    @staticmethod
    def of_table(seconds: Sequence[float], **terms: Any) -> StepCost:
        """A price for every row count: seconds[0] is a step of one row."""
        return StepCost(tuple(range(1, len(seconds) + 1)), tuple(seconds), **terms)

    def target(
        self, rows: ArrayLike, *, requests: ArrayLike = 1, context: ArrayLike = 0, prefill: ArrayLike = 0
    ) -> Seconds:
        """Seconds of a step without drafting.

        `rows` have logits: 1 + plan for each of `requests`. `context` is the sum of the tokens in the pages of all of
        them. `prefill` rows go through the same forward and have none.
        """
        count, tokens = np.asarray(requests, float), np.asarray(context, float)
        everything = np.asarray(rows, float) + self.prefill_weight * np.asarray(prefill, float)
        attended = everything * tokens / np.maximum(count, 1.0)
        linear = self.per_request * count + self.per_context * tokens + self.per_attended * attended
        return _along(everything, self.rows, self.seconds) + linear

    def draft(self, requests: ArrayLike, slots: ArrayLike, *, context: ArrayLike = 0) -> Seconds:
        """Seconds to draft `slots` tokens for each of `requests` drafting requests; 0 where either is 0."""
        count, width, tokens = np.broadcast_arrays(
            np.asarray(requests, float), np.asarray(slots, float), np.asarray(context, float)
        )
        if not self.draft_seconds:
            return np.zeros(count.shape)
        by_slots = [_along(width, self.draft_slots, row) for row in self.draft_seconds]
        i, share = _segment(count, self.draft_requests)
        table = np.stack(by_slots)
        low = np.take_along_axis(table, i[None], 0)[0]
        high = np.take_along_axis(table, np.minimum(i + 1, len(by_slots) - 1)[None], 0)[0]
        price = low + share * (high - low) + self.draft_per_context * tokens
        return np.where((count > 0) & (width > 0), price, 0.0)

    def of_step(self, step: StepTime) -> tuple[float, float]:
        """What `target` and `draft` say of one step, much faster than arrays do."""
        everything = step.rows + self.prefill_weight * step.prefill
        i, share = place(everything, self.rows)
        target = _between(self.seconds, i, share) + self.per_request * step.requests + self.per_context * step.context
        target += self.per_attended * everything * step.context / max(step.requests, 1)
        if not (step.drafting and step.slots and self.draft_seconds):
            return target, 0.0
        i, share = place(step.slots, self.draft_slots)
        j, along = place(step.drafting, self.draft_requests)
        low = _between(self.draft_seconds[j], i, share)
        high = _between(self.draft_seconds[min(j + 1, len(self.draft_seconds) - 1)], i, share)
        context = step.context * step.drafting / max(step.requests, 1)
        return target, low + along * (high - low) + self.draft_per_context * context

    def table(self, most: int, *, requests: ArrayLike = 1, context: ArrayLike = 0, prefill: ArrayLike = 0) -> Seconds:
        """Seconds of a step of 1..`most` rows with logits, as an array whose index is rows - 1."""
        return self.target(np.arange(1, most + 1), requests=requests, context=context, prefill=prefill)

    def steps_per_second(self, most: int, **load: Any) -> Seconds:
        """SPS(B) for B = 1..`most`, index B - 1, under a load as in `table`. (DSpark, §5.2)"""
        return 1.0 / self.table(most, **load)

    @property
    def inert(self) -> bool:
        """Whether the table is too flat to plan with: verifying everything costs next to nothing."""
        return self.seconds[-1] < INERT * self.seconds[0]

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return asdict(self)

    @staticmethod
    def of_dict(given: Any, source: str | Path = "cost") -> StepCost:
        """The cost that `as_dict` wrote. Raises UserError naming the field that does not fit."""
        names = {field.name for field in fields(StepCost)}
        if not isinstance(given, dict) or not {"rows", "seconds"} <= set(given) <= names:
            raise UserError(f"{source} holds no step cost (it needs rows and seconds); measure it with dspark profile")
        try:
            values = {name: _tupled(value) for name, value in given.items()}
            return StepCost(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: {error}") from error

    def save_sps(self, path: str | Path, *, most: int | None = None) -> None:
        """Write SGLang's table of steps per second by batch tokens (`--speculative-dspark-sps-table-path`)."""
        largest = most or self.rows[-1]
        probes = [rows for rows in self.rows if rows <= largest]
        table = {
            "sample_batch_tokens": probes,
            "sample_steps_per_sec": (1.0 / self.target(probes)).tolist(),
            "max_batch_tokens": largest,
        }
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps(table, indent=1), encoding="utf-8")


def _along(x: Seconds, knots: Sequence[float], values: Sequence[float]) -> Seconds:
    """Piecewise linear through (knots, values), held before the first, going on with the last slope past the last."""
    i, share = _segment(x, knots)
    value = np.asarray(values, float)
    return value[i] + share * (value[np.minimum(i + 1, len(value) - 1)] - value[i])


def _segment(x: Seconds, knots: Sequence[float]) -> tuple[NDArray[np.intp], Seconds]:
    """The segment each x falls into, and how far along it: 0 before the first knot, above 1 past the last."""
    knot = np.asarray(knots, float)
    i = np.clip(np.searchsorted(knot, x, side="right") - 1, 0, max(len(knot) - 2, 0))
    if len(knot) == 1:
        return i, np.zeros(x.shape)
    return i, np.maximum((x - knot[i]) / (knot[i + 1] - knot[i]), 0.0)


def place(x: float, knots: Sequence[float]) -> tuple[int, float]:
    """`_segment` of one number."""
    if len(knots) == 1:
        return 0, 0.0
    i = min(max(bisect_right(knots, x) - 1, 0), len(knots) - 2)
    return i, max((x - knots[i]) / (knots[i + 1] - knots[i]), 0.0)


def _between(values: Sequence[float], i: int, share: float) -> float:
    return values[i] + share * (values[min(i + 1, len(values) - 1)] - values[i])


def hats(x: Seconds, knots: Sequence[float]) -> Seconds:
    """How much each knot counts at each x, [len(x), len(knots)]: the price there is this times the knots' prices."""
    i, share = _segment(x, knots)
    weight = np.zeros((len(x), len(knots)))
    each = np.arange(len(x))
    weight[each, np.minimum(i + 1, len(knots) - 1)] += share
    weight[each, i] += 1 - share
    return weight


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def _check_axis(name: str, axis: Sequence[int], length: int) -> None:
    if not axis or len(axis) != length or list(axis) != sorted(set(axis)) or axis[0] < 1:
        raise UserError(f"cost: {name} {list(axis)} must rise from 1 or more, one for each of {length} measurements")


def _check_rising(name: str, values: Sequence[float]) -> None:
    if not all(0.0 < value < float("inf") for value in values) or list(values) != sorted(values):
        raise UserError(f"cost: {name} {list(values)} must be above 0 and never fall; measure the profile anew")
