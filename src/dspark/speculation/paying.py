"""Which drafted tokens are worth their rows of the target's forward, at a choice's price of time.

R requests, K draft slots, N drafted tokens verified. Whether a token is verified goes by the survival up to it and by
what lies beyond it on average, never by the tokens after it.
"""

from __future__ import annotations

import numpy as np

from dspark.ops.walk import walk
from dspark.speculation.choice import Choice
from dspark.speculation.prices import Prices
from dspark.speculation.round import Array, Round, as_array
from dspark.speculation.scheduled import RunningMeans
from dspark.speculation.worth import Worth


def paying(
    round: Round, survival_RK: Array, choice: Choice, *, prices: Prices, means: RunningMeans, worth: Worth
) -> list[int]:
    """How many of each request's tokens: by a bound on survival, or where prices have cliffs by a walk over slots."""
    if round.requests == 1:
        return [_alone(survival_RK[0].tolist(), round, choice, prices=prices, means=means, worth=worth)]
    a_RK, weight_R = as_array(survival_RK), worth.of(round)
    if choice.bound is not None:
        worth_RK = a_RK if worth.alike else a_RK * weight_R[:, None]
        return np.minimum((worth_RK > choice.bound).sum(1), round.limit_R).tolist()
    asked_R = round.asked_R or round.limit_R
    seconds_N1, ahead_KK = prices.verifying(round, sum(asked_R)), means.ahead(a_RK.shape[1])
    return walk(a_RK * weight_R[:, None], round.limit_R, asked_R, ahead_KK, seconds_N1, rate=choice.rate)


def _alone(
    survival_K: list[float], round: Round, choice: Choice, *, prices: Prices, means: RunningMeans, worth: Worth
) -> int:
    """`walk` for one request: what it weighs at slot k is linear in its survival, so a bound decides."""
    limit = round.limit_R[0]
    asked = (round.asked_R or round.limit_R)[0]
    if len(choice.stop_K) != asked:
        weight = float(worth.of(round)[0])
        choice.stop_K = _stops(prices.verifying(round, asked), means.ahead(asked), choice.rate / weight)
    for k, (survival, bound) in enumerate(zip(survival_K[:limit], choice.stop_K, strict=False)):
        if not survival > bound:
            return k
    return limit


def _stops(seconds_N1: Array, ahead_KK: Array, price: float) -> list[float]:
    """The survival at each slot of one request below which no set of rows from there on pays, at `price` a second."""
    sum_KK = np.cumsum(ahead_KK, axis=1)
    bounds = [price * (seconds_N1[k + 1 :] - seconds_N1[k]) / sum_KK[k, k:] for k in range(len(ahead_KK))]
    return [float(bound.min()) for bound in bounds]
