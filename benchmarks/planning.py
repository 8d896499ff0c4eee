"""Time to plan one step while everybody drafts, by planner and requests: bar 200 µs and 2 % of a step at 64 requests.

python benchmarks/planning.py [--requests 1 8 64] [--slots 7] [--steps 400] [--prices straight stairs]

The engine's own admission, planning and calibration over synthetic rounds (`simulation/replica.py`), requests coming
and going. The prices are of a device on which a verified row costs little, so that drafting pays and no guard forbids
it; greedy rests all the same where stairs stop it. What is timed is all of `Planning`: `before` the draft who drafts
how many slots, `after` it how many are verified, and `learn`, the bookkeeping of the outcome. What is learnt or decided
every few steps counts in the mean. The calibration has a curve, which costs more than none. Process time, so that
neighbours do not count.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from dspark.common.provenance import provenance
from dspark.simulation.replica import Replica, Sizes, closed_loop
from dspark.speculation.calibration import Calibration, Fit
from dspark.speculation.cost import StepCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.round_trace import RoundTrace

SIZES = Sizes(prompt_tokens=(32, 96), new_tokens=(128, 384), kinds={"": 1.0})
ROW = 1e-5  # s
PLAIN = 9e-3
STAIR = 64  # rows
PHASES = ("before", "after", "learn")


def cost(prices: str) -> StepCost:
    """A step of 64 rows takes 10 ms; rows in a line, or as much in stairs of `STAIR` rows."""
    row = np.arange(1, 513)
    height = row if prices == "straight" else STAIR * np.ceil(row / STAIR)
    return StepCost.of_table(
        (PLAIN + ROW * height).tolist(),
        draft_requests=(1, 64),
        draft_slots=(1, 7),
        draft_seconds=((4e-4, 6e-4), (8e-4, 1.2e-3)),
    )


def rounds(slots: int) -> RoundTrace:
    """Blocks whose confidences are fair."""
    random = np.random.default_rng(0)
    confidence_NK = random.uniform(0.4, 1.0, (4096, slots))
    accepted_N = (random.random((4096, slots)) < confidence_NK).cumprod(1).sum(1)
    return RoundTrace(slots, {"": confidence_NK}, {"": accepted_N})


def curved(slots: int) -> Fit:
    """A calibration that changes nothing and takes as long as one that does."""
    curve = tuple(np.linspace(0.0, 1.0, 21).tolist())
    return Fit((1.0,) * slots, (0.0,) * slots, (), curve=(curve,) * slots)


class Timed:
    """A planning whose three parts are timed, step by step."""

    def __init__(self, planning):
        self.planning = planning
        self.parts: list[list[float]] = []

    def __getattr__(self, name):
        return getattr(self.planning, name)

    def slots(self, *given):
        self.parts.append([0.0] * len(PHASES))
        return self._timed(0, self.planning.slots, given)

    def plan(self, *given):
        return self._timed(1, self.planning.plan, given)

    def observe(self, *given):
        return self._timed(2, self.planning.observe, given)

    def _timed(self, part, function, given):
        started = time.process_time_ns()
        found = function(*given)
        self.parts[-1][part] += (time.process_time_ns() - started) / 1e3
        return found


def measure(name: str, requests: int, slots: int, steps: int, prices: str) -> dict[str, object]:
    """Microseconds of planning a step: the median by part and in all, the mean, and its share of the step."""
    replica = Replica(cost(prices), rounds(slots), name, planning_time=False)
    planning = replica.planning
    planning.calibration = OnlineCalibration(Calibration(slots, {"sampled": curved(slots)}))
    closed_loop(replica, SIZES, requests, max(2 * requests, 8))  # everything is warm and past the guard's first look
    timed = replica.planning = Timed(planning)
    began, ledger = replica.now, planning.ledger
    before = ledger.drafting_steps, ledger.resting_steps, ledger.verified
    while len(timed.parts) < steps:
        for _ in replica.step():
            replica.add(*SIZES.draw(replica.random))
    micros = np.array(timed.parts)
    whole = micros.sum(1)
    drafting, resting, verified = (
        now - then
        for now, then in zip((ledger.drafting_steps, ledger.resting_steps, ledger.verified), before, strict=True)
    )
    return {
        "planner": name,
        "prices": prices,
        "requests": requests,
        "median_us": round(float(np.median(whole)), 1),
        "mean_us": round(float(whole.mean()), 1),
        **{f"{part}_us": round(float(np.median(micros[:, i])), 1) for i, part in enumerate(PHASES)},
        "share_of_step": round(float(whole.sum()) / 1e6 / (replica.now - began), 4),
        "drafting_steps": round(drafting / (drafting + resting), 3),
        "verified_per_request": round(verified / max(drafting, 1) / requests, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--slots", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--planners", nargs="+", default=["greedy", "lagged", "lookahead", "joint"])
    parser.add_argument("--prices", nargs="+", choices=["straight", "stairs"], default=["straight", "stairs"])
    options = parser.parse_args()
    print(json.dumps(provenance(torch.device("cpu"))))
    for requests in options.requests:
        for name in options.planners:
            for prices in options.prices:
                found = measure(name, requests, options.slots, options.steps, prices)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
