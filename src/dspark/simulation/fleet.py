"""A day of traffic on many replicas: requests arrive, wait, are served at the speed of their number, and leave.

R replicas, B stretches of time, S numbers of requests in a replica.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.simulation.capacity import Capacity

Array = NDArray[np.float64]
STEPS_IN_STAY = 8  # time steps in the stay of one request alone: short enough that states change by few at a time
MOST_STEPS = 90_000  # in all; where time is longer, each stretch is simulated at its beginning and then continued
LEAST_STEPS = 40  # of a stretch
STATES = 4096  # requests in a replica that are told apart in the counts


@dataclass(frozen=True)
class FleetDay:
    """What a fleet did, by stretch of time and over all arrivals."""

    rate_B: Array  # arrivals per second
    running_B: Array  # mean requests in a replica
    waiting_B: Array  # mean requests in a replica that wait
    served: float  # requests
    left: float  # requests still there at the end
    speed_p5: float  # tokens/s that 95 of 100 requests reach
    speed: float  # median
    first_token: float  # s, median
    first_token_p95: float
    seconds: float  # of simulated time


def simulate_fleet(
    capacity: Capacity,
    rate_B: Array,
    stretch: float,
    *,
    replicas: int,
    seed: int = 0,
    balanced: bool = True,
) -> FleetDay:
    """`replicas` under arrivals at `rate_B` a second, each rate for `stretch` seconds.

    Numbers of arrivals and of departures in a time step are Poisson; arrivals go to the replicas with the fewest
    requests (`balanced`) or to any. Where the steps would be too many, every stretch is simulated for its first part
    and its queue then continued in a straight line: the state within a stretch settles in a few stays of a request.
    """
    random = np.random.default_rng(seed)
    stay = 1.0 / float(capacity.completions(np.array([1.0]))[0])
    step = min(stay / STEPS_IN_STAY, stretch / LEAST_STEPS)
    each = int(max(LEAST_STEPS, min(stretch / step, MOST_STEPS / len(rate_B))))
    rest = max(stretch - each * step, 0.0)
    rate_S = capacity.completions(np.arange(STATES, dtype=float))
    found_S = np.zeros(STATES)
    inside_R = np.zeros(replicas, dtype=np.int64)
    running_B, waiting_B, served = np.zeros(len(rate_B)), np.zeros(len(rate_B)), 0.0
    for b, rate in enumerate(rate_B):
        began, total, queued = inside_R.sum(), 0.0, 0.0
        seen_S = np.zeros(STATES)
        for _ in range(each):
            _arrive(inside_R, int(random.poisson(rate * step)), seen_S, random, balanced)
            gone_R = random.poisson(rate_S[np.minimum(inside_R, STATES - 1)] * step)
            np.minimum(gone_R, inside_R, out=gone_R)
            inside_R -= gone_R
            total += inside_R.mean()
            queued += np.maximum(inside_R - capacity.most, 0).mean()
        running, waiting = total / each, queued / each
        growth = (inside_R.sum() - began) / replicas / (each * step)
        net = rate / replicas - rate_S[capacity.most]
        if rest and (net >= 0 or growth < 0.5 * net):  # a queue that builds up, or goes down as fast as it can
            path = _continued(inside_R, net * rest, capacity.most)
            spread = np.minimum(np.round(path).astype(np.int64), STATES - 1)
            np.add.at(seen_S, spread, seen_S.sum() * rest / (each * step) / len(path))
            share = rest / stretch
            running += share * (path.mean() - running)
            waiting += share * (np.maximum(path - capacity.most, 0).mean() - waiting)
            inside_R = np.maximum(inside_R + round(float(path[-1] - path[0])), 0)
        found_S += seen_S * (rate * stretch / max(seen_S.sum(), 1.0))
        running_B[b], waiting_B[b] = running, waiting
        served += began + rate * stretch - inside_R.sum()
    return FleetDay(
        np.asarray(rate_B, float),
        running_B,
        waiting_B,
        served,
        float(inside_R.sum()),
        *_promises(capacity, found_S),
        stretch * len(rate_B),
    )


def _continued(inside_R: NDArray[np.int64], change: float, most: int) -> Array:
    """Mean requests in a replica over the rest of a stretch: a queue goes on as it went, down to none."""
    now = float(inside_R.mean())
    return np.linspace(now, max(now + change, min(now, float(most))), 32)


def _arrive(
    inside_R: NDArray[np.int64], count: int, seen_S: Array, random: np.random.Generator, balanced: bool
) -> None:
    """Put `count` new requests into replicas, and count what they find there, themselves included."""
    if not count:
        return
    if balanced:
        order = np.argsort(inside_R, kind="stable")
        full, more = divmod(count, len(inside_R))
        if full:
            # more arrivals than replicas: everyone gets its share, the emptiest the rest
            inside_R += full
        target = order[:more]
        inside_R[target] += 1
        touched = np.minimum(inside_R if full else inside_R[target], STATES - 1)
        np.add.at(seen_S, touched, count / max(len(touched), 1))
    else:
        target = random.integers(len(inside_R), size=count)
        np.add.at(inside_R, target, 1)
        np.add.at(seen_S, np.minimum(inside_R[target], STATES - 1), 1.0)


def _promises(capacity: Capacity, found_S: Array) -> tuple[float, float, float, float]:
    """Speed p5 and median, time to the first token median and p95, over arrivals by what they found."""
    state_S = np.maximum(np.arange(STATES, dtype=float), 1.0)
    inside_S = np.minimum(state_S, capacity.most)
    wait_S = np.maximum(state_S - capacity.most, 0.0) / float(capacity.completions(np.array([float(capacity.most)]))[0])
    return (
        -_percentile(-capacity.at("slow_speed", inside_S), found_S, 0.95),
        _percentile(capacity.at("speed", inside_S), found_S, 0.5),
        _percentile(wait_S + capacity.at("first_token", inside_S), found_S, 0.5),
        _percentile(wait_S + capacity.at("slow_first_token", inside_S), found_S, 0.95),
    )


def _percentile(value_S: Array, weight_S: Array, share: float) -> float:
    """The value that `share` of the weight does not exceed."""
    order_S = np.argsort(value_S, kind="stable")
    covered_S = np.cumsum(weight_S[order_S])
    if covered_S[-1] <= 0:
        return float(value_S[order_S[0]])
    return float(value_S[order_S][min(int(np.searchsorted(covered_S, share * covered_S[-1])), len(order_S) - 1)])
