"""Keeps a measured price true while the engine runs: every step says how far off it was, and is believed a little."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dspark.speculation.cost import StepCost, StepTime, place
from dspark.speculation.cost_fit import never_falling
from dspark.speculation.ledger import Priced

REFRESH = (16, 64)  # observed steps between two prices, first and later: planners keep tables for that long
SKIP = 4  # steps to one that is learnt from, once the first have been
EXPLORE_EVERY = 128  # steps between two that may try a row count nobody tries
START = 10  # observed steps that the profile counts for
LEAST_RATE = 0.05  # of the whole price; one that was right before is forgotten within some fifty observed steps
KNOT_RATE = 0.05  # of one row count's own part
SHRINK = 0.005  # of a row count's own part towards none
CLIP = 3.0  # a step off by more than this many times the usual error is an interruption, and moves the price no further
AGREEING = 8  # ... but that many on end, off to the same side, are a price that is wrong
BELIEVED = 0.5  # share of what they agree on by which the price then moves at once


class _Correction:
    """A factor on a table: one for all of it and one for each knot, in logarithms."""

    def __init__(self, knots: Sequence[int]):
        self.knots = knots
        self.whole = 0.0
        self.own = [0.0] * len(knots)
        self.seen = [0.0] * len(knots)  # weights of the observations, for exploring
        self.usual = 0.05  # running mean of the size of the error
        self.count = 0
        self.newest: deque[float] = deque(maxlen=AGREEING)  # errors

    def observe(self, at: float, seconds: float, price: float) -> None:
        """Take one measured step whose uncorrected price is `price`."""
        i, share = place(at, self.knots)
        share = min(share, 1.0)
        touched = ((i, 1.0 - share), (min(i + 1, len(self.knots) - 1), share))
        error = math.log(seconds / price) - self.whole - sum(self.own[knot] * weight for knot, weight in touched)
        self.count += 1
        if self._wrong_by(error):
            return
        step = min(max(error, -CLIP * self.usual), CLIP * self.usual)
        # the unclipped error has a say, or a machine that has become twice as slow would be an interruption for ever
        self.usual += 0.05 * (min(abs(error), 2 * CLIP * self.usual) - self.usual)
        self.usual = max(self.usual, 0.005)
        self.whole += max(LEAST_RATE, 1.0 / (START + self.count)) * step
        for knot, weight in touched:
            own = self.own[knot] + KNOT_RATE * weight * step
            self.own[knot] = own * (1.0 - SHRINK * weight)
            self.seen[knot] += weight

    def _wrong_by(self, error: float) -> bool:
        """Whether this and the errors before it agree that the price is far off; then it has moved."""
        self.newest.append(error)
        low, high = min(self.newest), max(self.newest)
        agreed = low if low > 0 else min(high, 0.0)
        if len(self.newest) < AGREEING or abs(agreed) <= CLIP * self.usual:
            return False
        self.whole += BELIEVED * agreed
        self.newest.clear()
        return True

    def factors(self) -> list[float]:
        """What to multiply the value of each knot by."""
        return [math.exp(self.whole + own) for own in self.own]


class LiveCost:
    """A profile's cost and what the engine's own steps have said since. Pass `observe` to the engine as its meter."""

    def __init__(self, cost: StepCost, *, split: bool = True):
        """`split` False for a device whose draft is only launched within `draft_seconds`: both parts are then one."""
        self.profile = cost
        self.cost = cost  # read this one
        self.split = split
        self.priced = Priced()
        self._target = _Correction(cost.rows)
        self._draft = _Correction(cost.draft_requests) if cost.draft_seconds else None
        self._steps = self._observed = 0
        self._asked = 0

    def observe(self, step: StepTime) -> None:
        """Learn from one step; later from every fourth, for a step of a small model is short, but from rare drafts."""
        self._steps += 1
        rare = step.drafting and self._draft is not None and self._draft.count < REFRESH[1]
        if self._observed > REFRESH[1] and self._steps % SKIP and not rare:
            return
        if not step.requests or step.seconds <= step.draft_seconds:
            return
        self.priced.observe(step, self.cost)
        target, draft = self.profile.of_step(step)
        at = step.rows + self.profile.prefill_weight * step.prefill
        if self.split:
            self._target.observe(at, step.seconds - step.draft_seconds if draft else step.seconds, target)
            if draft and self._draft is not None and step.draft_seconds > 0:
                self._draft.observe(step.drafting, step.draft_seconds, draft)
        else:
            self._target.observe(at, step.seconds, target + draft)
        self._observed += 1
        if self._observed % REFRESH[self._observed > REFRESH[1]] == 0:
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

    def _refresh(self) -> None:
        whole = math.exp(self._target.whole)
        pairs = zip(self.profile.seconds, self._target.factors(), strict=True)
        seconds = never_falling([price * factor for price, factor in pairs], [1 + seen for seen in self._target.seen])
        changes: dict[str, Any] = {
            "seconds": tuple(seconds),
            "per_request": self.profile.per_request * whole,
            "per_context": self.profile.per_context * whole,
            "per_attended": self.profile.per_attended * whole,
        }
        if self._draft is not None:
            factor = self._draft.factors() if self.split else [whole] * len(self.profile.draft_requests)
            table = np.array(self.profile.draft_seconds) * np.array(factor)[:, None]
            changes["draft_seconds"] = tuple(map(tuple, np.maximum.accumulate(table, 0).tolist()))
            changes["draft_per_context"] = self.profile.draft_per_context * factor[-1]
        self.cost = replace(self.profile, **changes)
