"""Time to plan one step, by planner and requests, beside the step it plans: bar 2 % of a step, 200 µs at 64 requests.

python benchmarks/planning.py [--requests 1 8 64] [--slots 7] [--steps 400]

Synthetic rounds; every step is `slots`, calibration, `plan` and `observe`; what is learnt every few steps counts in the
mean. Process time, so that neighbours do not count.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.speculation.calibration import Calibration
from dspark.speculation.cost import StepCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import parse_planner
from dspark.speculation.round import Outcome, Round

COST = StepCost(
    rows=(1, 8, 512),
    seconds=(5e-4, 6e-4, 2e-2),
    draft_requests=(1, 64),
    draft_slots=(1, 7),
    draft_seconds=((1e-4, 2e-4), (2e-3, 4e-3)),
)
WARM = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--slots", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--planners", nargs="+", default=["greedy", "lagged", "lookahead", "joint"])
    options = parser.parse_args()
    print(json.dumps(provenance(torch.device("cpu"))))
    for requests in options.requests:
        for name in options.planners:
            print(json.dumps(measure(name, requests, options.slots, options.steps)), flush=True)


def measure(name: str, requests: int, slots: int, steps: int) -> dict[str, object]:
    """Microseconds of planning a step: median and mean, and the share of the mean step."""
    planner, calibration = parse_planner(name, COST), OnlineCalibration(Calibration(slots, {}))
    random, params = np.random.default_rng(0), [SamplingParams()] * requests
    before = Round([slots] * requests, (), list(range(requests)), [200] * requests, params)
    micros, planned_seconds, verified = [], 0.0, 0
    for step in range(WARM + steps):
        raw_RK = random.uniform(0.4, 1.0, (requests, slots))
        accepted_RK = random.random((requests, slots)) < raw_RK
        started = time.process_time_ns()
        asked = planner.slots(before)
        width = max(asked)
        now, survival_RK, plan = before.drafted(asked, asked), None, [0] * requests
        if width:
            survival_RK = np.cumprod(calibration.confidence(now, raw_RK[:, :width]), axis=1)
            plan = planner.plan(now, survival_RK)
        middle = time.process_time_ns()
        accepted = [int(row[:n].cumprod().sum()) for row, n in zip(accepted_RK, plan, strict=True)]
        drafting = sum(n > 0 for n in asked)
        seconds = float(COST.target(requests + sum(plan), requests=requests) + COST.draft(drafting, width))
        again = time.process_time_ns()
        if width:
            calibration.observe(raw_RK[:, :width], plan, accepted)
        planner.observe(Outcome(now, plan, accepted, seconds, survival_RK))
        ended = time.process_time_ns()
        if step >= WARM:
            micros.append((middle - started + ended - again) / 1e3)
            planned_seconds += seconds
            verified += sum(plan)
    return {
        "planner": name,
        "requests": requests,
        "slots": slots,
        "median_us": round_to(np.median(micros)),
        "mean_us": round_to(np.mean(micros)),
        "share_of_step": round(float(np.sum(micros)) / 1e6 / planned_seconds, 4),
        "verified_per_step": verified / steps,
    }


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
