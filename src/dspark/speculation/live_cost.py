"""Keeps a measured price true while the engine runs: every step says how far off it was, and is believed a little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dspark.speculation.cost import StepCost, StepTime, hats
from dspark.speculation.cost_fit import never_falling

REFRESH = 16  # observed steps between two prices: a planner sees one price for that long
EXPLORE_EVERY = 128  # steps between two that may try a row count nobody tries
START = 10  # observed steps that the profile counts for
LEAST_RATE = 0.02  # of the whole price; a price that was right before is forgotten within about a hundred steps
KNOT_RATE = 0.05  # of one row count's own part
CLIP = 3.0  # a step off by more than this many times the usual error is an interruption, and moves the price no further


class _Correction:
    """A factor on a table: one for all of it and one for each knot, in logarithms."""

    def __init__(self, knots: Sequence[int]):
        self.knots = knots
        self.whole = 0.0
        self.own = np.zeros(len(knots))
        self.seen = np.zeros(len(knots))  # weights of the observations, for exploring
        self.usual = 0.05  # running mean of the size of the error
        self.count = 0

    def observe(self, at: float, seconds: float, price: float) -> None:
        """Take one measured step whose uncorrected price is `price`."""
        weight = hats(np.array([at]), self.knots)[0]
        error = math.log(seconds / price) - self.whole - float(weight @ self.own)
        step = min(max(error, -CLIP * self.usual), CLIP * self.usual)
        self.count += 1
        # the unclipped error has a say, or a machine that has become twice as slow would be an interruption for ever
        self.usual += 0.05 * (min(abs(error), 2 * CLIP * self.usual) - self.usual)
        self.usual = max(self.usual, 0.005)
        self.whole += max(LEAST_RATE, 1.0 / (START + self.count)) * step
        self.own += KNOT_RATE * weight * step
        self.own *= 1.0 - 0.1 * KNOT_RATE * weight
        self.seen += weight

    def factors(self) -> np.ndarray:
        """What to multiply the value of each knot by."""
        return np.exp(self.whole + self.own)


class LiveCost:
    """A profile's cost and what the engine's own steps have said since. Pass `observe` to the engine as its meter."""

    def __init__(self, cost: StepCost, *, split: bool = True):
        """`split` False for a device whose draft is only launched within `draft_seconds`: both parts are then one."""
        self.profile = cost
        self.cost = cost  # read this one
        self.split = split
        self._target = _Correction(cost.rows)
        self._draft = _Correction(cost.draft_requests) if cost.draft_seconds else None
        self._observed = 0
        self._asked = 0

    def observe(self, step: StepTime) -> None:
        """Learn from one step."""
        if not step.requests:
            return
        load = {"requests": step.requests, "context": step.context, "prefill": step.prefill}
        target = float(self.profile.target(step.rows, **load))
        draft = float(self.profile.draft(step.drafting, step.slots, context=self._draft_context(step)))
        at = step.rows + self.profile.prefill_weight * step.prefill
        if self.split:
            self._target.observe(at, step.seconds - step.draft_seconds if draft else step.seconds, target)
            if draft and self._draft is not None:
                self._draft.observe(step.drafting, step.draft_seconds, draft)
        else:
            self._target.observe(at, step.seconds, target + draft)
        self._observed += 1
        if self._observed % REFRESH == 0:
            self._refresh()

    def explore(self, rows: int, most: int) -> int:
        """Usually `rows`; now and then the row count near it, up to `most`, whose price was seen least.

        Depends on counts alone, never on tokens, so a planner may follow it.
        """
        self._asked += 1
        if self._asked % EXPLORE_EVERY:
            return rows
        near = [i for i, knot in enumerate(self._target.knots) if rows / 2 <= knot <= min(2 * rows, most)]
        if not near:
            return rows
        return int(self._target.knots[min(near, key=lambda i: self._target.seen[i])])

    def _draft_context(self, step: StepTime) -> float:
        return step.context * step.drafting / max(step.requests, 1)

    def _refresh(self) -> None:
        factor = self._target.factors()
        whole = math.exp(self._target.whole)
        seconds = never_falling((np.array(self.profile.seconds) * factor).tolist(), (1 + self._target.seen).tolist())
        changes: dict[str, object] = {
            "seconds": tuple(seconds),
            "per_request": self.profile.per_request * whole,
            "per_context": self.profile.per_context * whole,
            "per_attended": self.profile.per_attended * whole,
        }
        if self._draft is not None:
            factor = self._draft.factors() if self.split else np.full(len(self.profile.draft_requests), whole)
            table = np.array(self.profile.draft_seconds) * factor[:, None]
            changes["draft_seconds"] = tuple(map(tuple, np.maximum.accumulate(table, 0).tolist()))
        self.cost = replace(self.profile, **changes)  # type: ignore[arg-type]
