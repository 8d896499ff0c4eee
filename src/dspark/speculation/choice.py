"""What the joint planner chose for steps of one size: who drafts how many slots, and the price of time it rests on.

R requests, K draft slots, M = 0..R requests that draft, N drafted tokens verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark.common.sampling_params import SamplingParams
from dspark.speculation.circles import Circle, circle_of
from dspark.speculation.guard import Guard, size_of
from dspark.speculation.looks import Looks
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Round

CHOOSING = 2e-4, 2e-6  # s that reading and weighing a draft's confidences is taken to cost, and for each request
TRIED = 8  # one in so many requests is tried at a time
SAME = 0.99  # of the best rate: a choice that reaches it is as good as the best
STRAIGHT = 0.02  # of a step: prices this near to a line are taken for one


@dataclass(frozen=True)
class Rival:
    """The few that come next to drafting where nobody does."""

    requests: list[int]
    seconds: float  # more than a plain step takes
    expected: float  # s that its tokens are worth


@dataclass
class Choice:
    """It holds for steps of its size, with whoever comes meanwhile, until the step `until`."""

    size: int
    slots: dict[int, int] = field(default_factory=dict)  # by request
    newcomers: dict[Circle, int] = field(default_factory=dict)  # ... of requests that it did not weigh
    width: int = 0  # slots of those that draft
    tried_width: int = 0  # theirs, or the one that would come next to paying
    rate: float = 0.0  # tokens (by worth) per second: the price of a second
    plain: float = 0.0  # s of a plain step
    row: float = 0.0  # s of one verified token, on average
    bound: float | None = None  # on survival from which a token is worth its row, where prices rise along a line
    whole: bool = False  # drafts are verified whole: choosing among their tokens would win less than it takes
    rival: Rival | None = None
    until: int = 0
    steady: int = 0  # decisions of this size on end that came to the same
    stop_K: list[float] = field(
        default_factory=list
    )  # by slot, the survival below which one request's row does not pay

    def slots_of(self, request: int, params: SamplingParams) -> int | None:
        """The request's slots; None for one that only the planner can tell."""
        slots = self.slots.get(request)
        if slots is None and self.newcomers:
            slots = self.newcomers.get(circle_of(params))
            if slots is not None:
                self.slots[request] = slots
        return slots

    @property
    def drafting(self) -> int:
        """Requests that draft."""
        return len(self.slots) - list(self.slots.values()).count(0)


def weigh(
    round: Round,
    survival_RK: Array,
    weight_R: Array,
    *,
    prices: Prices,
    guard: Guard,
    looks: Looks,
    before: Choice | None,
) -> Choice:
    """The best of all choices for these requests; `before` is the one of this size that it follows."""
    requests, most = survival_RK.shape
    choice = Choice(size_of(requests))
    gain_MK, rows_MK, order_RK = gains(round, survival_RK, weight_R)
    verify_N1 = prices.verifying(round, int(rows_MK[-1, -1]))
    seconds_MK = verify_N1[rows_MK.astype(np.intp)] + prices.drafts(round, most)
    seconds_MK *= guard.factor(requests, drafting=True)
    choice.plain = float(verify_N1[0]) * guard.factor(requests, drafting=False)
    seconds_MK[0, :] = seconds_MK[:, 0] = choice.plain
    whole_MK = (weight_R.sum() + gain_MK) / seconds_MK
    price = before.rate * before.row if before is not None else 0.0
    gain_MK = np.maximum.accumulate(gain_MK - price * rows_MK, axis=1) + price * rows_MK
    gain_MK[1:, 1:] += np.arange(1, requests + 1)[:, None] * looks.options(most, price)
    seconds_MK[1:, 1:] += CHOOSING[0] + CHOOSING[1] * requests
    chosen_MK = (weight_R.sum() + gain_MK) / seconds_MK
    choice.whole = bool(whole_MK.max() >= chosen_MK.max())
    rate_MK = whole_MK if choice.whole else chosen_MK
    drafting, slots = (int(i) for i in np.unravel_index(int(rate_MK.argmax()), rate_MK.shape))
    choice.rate = float(rate_MK[drafting, slots])
    ids = ids_of(round)
    choice.slots = dict.fromkeys(ids, 0)
    if drafting and slots:
        choice.width = choice.tried_width = slots
        choice.slots.update((ids[r], slots) for r in order_RK[:drafting, slots - 1].tolist())
    else:
        drafting = max(1, requests // TRIED)
        choice.tried_width = slots = 1 + int(rate_MK[drafting, 1:].argmax())
        choice.rival = Rival(
            [ids[r] for r in order_RK[:drafting, slots - 1].tolist()],
            float(seconds_MK[drafting, slots]) - choice.plain,
            float(gain_MK[drafting, slots]) / choice.rate,
        )
    _price_rows(choice, round, prices)
    if before is not None:
        kept = float((whole_MK if before.whole else chosen_MK)[:, min(before.width, most)].max())
        choice.steady = before.steady + 1 if kept >= SAME * choice.rate else max(before.steady - 2, 0)
    return choice


def gains(round: Round, survival_RK: Array, weight_R: Array) -> tuple[Array, Array, NDArray[np.intp]]:
    """By slots, with the first M requests in the order of gain: accepted tokens by worth, and rows, [R + 1, K + 1].

    And that order, [R, K].
    """
    requests, most = survival_RK.shape
    limit_R1 = np.asarray(round.limit_R)[:, None]
    slot_K = np.arange(1, most + 1)
    rows_RK = np.minimum(slot_K, limit_R1)
    gain_RK = np.cumsum(weight_R[:, None] * survival_RK * (slot_K <= limit_R1), axis=1)
    order_RK = np.argsort(-gain_RK, axis=0, kind="stable")
    gain_MK, rows_MK = np.zeros((2, requests + 1, most + 1))
    np.cumsum(np.take_along_axis(gain_RK, order_RK, 0), axis=0, out=gain_MK[1:, 1:])
    np.cumsum(np.take_along_axis(rows_RK, order_RK, 0), axis=0, out=rows_MK[1:, 1:])
    return gain_MK, rows_MK, order_RK


def _price_rows(choice: Choice, round: Round, prices: Prices) -> None:
    """Where the step's price rises along a line, a token is worth its row from one survival on, whoever's it is."""
    pairs = zip(ids_of(round), round.limit_R, strict=True)
    verified = max(sum(min(choice.slots[i], limit) for i, limit in pairs), choice.tried_width)
    table_N1 = prices.verifying(round, verified)
    choice.row = float(table_N1[-1] - table_N1[0]) / verified
    off_N1 = table_N1 - table_N1[0] - choice.row * np.arange(verified + 1)
    if float(np.abs(off_N1).max()) <= STRAIGHT * float(table_N1[0]):
        choice.bound = choice.rate * choice.row


def ids_of(round: Round) -> list[int]:
    """The requests' numbers; their places where they have none."""
    return list(round.request_ids) or list(range(round.requests))
