"""What one replica can do, by requests in it at once: the table that fleets are planned with.

N numbers of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.common.errors import UserError
from dspark.engine.config import EngineConfig
from dspark.simulation.replica import Replica, Sizes, closed_loop
from dspark.speculation.cost import StepCost
from dspark.speculation.round_trace import RoundTrace

Array = NDArray[np.float64]
LEAST_SERVED = 96  # requests simulated for each point, and four for each user


@dataclass(frozen=True)
class Point:
    """A replica with so many requests at once."""

    users: int
    throughput: float  # tokens/s of all
    speed: float  # tokens/s of one request, median
    slow_speed: float  # ... of the slowest twentieth
    first_token: float  # s from admission to the first token, median
    slow_first_token: float  # ... 95th percentile
    budget: float  # rows of the target that a request gets in a step


@dataclass(frozen=True)
class Capacity:
    """Points of one policy, by users; between them everything is interpolated."""

    policy: str
    points: tuple[Point, ...]
    mean_new: float

    def at(self, name: str, users_N: Array) -> Array:
        """The value of a column for any numbers of requests at once, the last one's past the end."""
        return np.interp(users_N, [point.users for point in self.points], [getattr(p, name) for p in self.points])

    @property
    def most(self) -> int:
        """Requests that one replica runs at the same time."""
        return self.points[-1].users

    def completions(self, users_N: Array) -> Array:
        """Requests that end in a second, with so many in the replica."""
        capped_N = np.minimum(users_N, self.most)
        rate_N = self.at("throughput", np.maximum(capped_N, 1.0)) / self.mean_new
        return rate_N * np.minimum(capped_N, 1.0)


def measure_capacity(
    cost: StepCost,
    trace: RoundTrace,
    policy: str,
    sizes: Sizes,
    users: Sequence[int],
    *,
    config: EngineConfig | None = None,
) -> Capacity:
    """Simulate closed loops of one replica, step by step with the engine's own admission and planner."""
    points = []
    for count in users:
        replica = Replica(cost, trace, policy, config=config)
        found = closed_loop(replica, sizes, count, max(LEAST_SERVED, 4 * count))
        speeds = [one.speed for one in found.served if one.new_tokens > 1]
        waits = [one.first - one.arrived for one in found.served]
        if not speeds:
            raise UserError("requests of one token have no speed; pass --new-tokens 2 or more")
        points.append(
            Point(
                users=count,
                throughput=found.throughput,
                speed=float(np.median(speeds)),
                slow_speed=float(np.percentile(speeds, 5)),
                first_token=float(np.median(waits)),
                slow_first_token=float(np.percentile(waits, 95)),
                budget=found.budget,
            )
        )
    return Capacity(policy, tuple(points), sizes.mean_new)


@dataclass(frozen=True)
class Goal:
    """What users are promised; None for no promise."""

    speed: float | None = None  # tokens/s that 95 of 100 requests reach
    first_token: float | None = None  # s that 95 of 100 wait at most


@dataclass(frozen=True)
class Load:
    """A replica under arrivals that know nothing of each other, in the long run."""

    rate: float  # requests per second
    running: float  # mean requests in it
    speed: float  # tokens/s that 95 of 100 requests reach
    first_token: float  # s that 95 of 100 wait at most
    throughput: float  # tokens/s

    def meets(self, goal: Goal) -> bool:
        """Whether the promise is kept."""
        fast = goal.speed is None or self.speed >= goal.speed
        return fast and (goal.first_token is None or self.first_token <= goal.first_token)


QUEUE = 4000  # states with waiting requests that count


def stationary(capacity: Capacity, rate: float) -> Load | None:
    """The long run of one replica at `rate` arrivals a second; None if it cannot keep up.

    A birth-death process: n requests end at `completions(n)`; past `most` they wait. What an arrival finds is what
    time finds (Poisson arrivals), and whom it finds decides how fast it is served.
    """
    state_N = np.arange(1, capacity.most + QUEUE + 1, dtype=float)
    rate_N = capacity.completions(state_N)
    if rate >= 0.995 * rate_N[-1]:
        return None
    log_N = np.concatenate([[0.0], np.cumsum(np.log(rate) - np.log(rate_N))])
    share_N = np.exp(log_N - log_N.max())
    share_N /= share_N.sum()
    found_N = np.arange(len(share_N), dtype=float) + 1  # with the arrival itself
    wait_N = np.maximum(found_N - capacity.most, 0.0) / rate_N[-1]
    wait_N = wait_N + capacity.at("slow_first_token", np.minimum(found_N, capacity.most))
    speed_N = capacity.at("slow_speed", np.minimum(found_N, capacity.most))
    return Load(
        rate=rate,
        running=float(share_N @ (found_N - 1)),
        speed=_reached(speed_N, share_N, 0.95),
        first_token=-_reached(-wait_N, share_N, 0.95),
        throughput=rate * capacity.mean_new,
    )


def highest_rate(capacity: Capacity, goal: Goal) -> Load:
    """The most arrivals a second at which one replica keeps the promise.

    Raises UserError, with the best that can be reached, if it does not even for one request alone.
    """
    alone = capacity.points[0]
    if goal.speed is not None and alone.slow_speed < goal.speed:
        raise UserError(
            f"{goal.speed:g} tokens/s for each user is impossible with {capacity.policy}: "
            f"a request alone on a replica gets {alone.slow_speed:.4g}; ask for less"
        )
    if goal.first_token is not None and alone.slow_first_token > goal.first_token:
        raise UserError(
            f"a first token within {1000 * goal.first_token:g} ms is impossible with {capacity.policy}: "
            f"a request alone on a replica waits {1000 * alone.slow_first_token:.4g} ms; allow more"
        )
    low, high = 0.0, float(capacity.completions(np.array([float(capacity.most)]))[0])
    best = stationary(capacity, high * 1e-6)
    for _ in range(40):
        middle = (low + high) / 2
        load = stationary(capacity, middle)
        if load is not None and load.meets(goal):
            low, best = middle, load
        else:
            high = middle
    assert best is not None
    return best


def _reached(value_N: Array, share_N: Array, share: float) -> float:
    """The value that `share` of the arrivals reach or exceed."""
    order_N = np.argsort(-value_N, kind="stable")
    covered_N = np.cumsum(share_N[order_N])
    return float(value_N[order_N][min(int(np.searchsorted(covered_N, share)), len(order_N) - 1)])
