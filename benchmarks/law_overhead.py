"""Time of the law alone, per round, as an engine on a CPU has it: draft draws, adjusting, verification. No model runs.

    OMP_NUM_THREADS=1 python benchmarks/law_overhead.py [--vocabulary 4096] [--slots 7]

Prints microseconds (median over runs of ten, interleaved) for one round, by request count and sampling parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, adjust
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise
from dspark.speculation.planner import parse_planner
from dspark.speculation.round import Round
from dspark.speculation.survival import survival
from dspark.speculation.verify import verify_logits

CASES = {
    "temperature 0": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "temperature 1, coupled": SamplingParams(seed=1),
    "temperature 0.7": SamplingParams(temperature=0.7),
    "top-k 20": SamplingParams(top_k=20),
    "top-p 0.9": SamplingParams(top_p=0.9),
    "top-k 50, top-p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "min-p 0.05": SamplingParams(min_p=0.05),
    "penalties": SamplingParams(temperature=0, frequency_penalty=0.1),
}
PARTS = ("noise", "draft draws", "plan", "adjust", "verify")


class Case:
    """One kind of request, R times, with peaked random logits and a drafter that is nearly right."""

    def __init__(self, params: SamplingParams, requests: int, slots: int, vocabulary: int) -> None:
        self.params, self.requests, self.slots = params, requests, slots
        target = torch.randn(requests, slots + 1, vocabulary) * 5
        self.target_BV = target.reshape(-1, vocabulary)
        self.draft_RKV = target[:, :slots] + 0.3 * torch.randn(requests, slots, vocabulary)
        self.shaping = Shaping.of([params] * requests)
        self.planner = parse_planner("threshold:0.5")
        self.confidence_RK = torch.full((requests, slots), 0.9)
        self.history = None
        if params.penalized:
            self.history = History.of([[1, 2, 3]] * requests, [[4, 5]] * requests, vocabulary)
        self.round = 0

    def run(self) -> list[float]:
        """Seconds of each part of one round."""
        requests, slots = self.requests, self.slots
        self.round += 1
        greedy = [self.params.temperature == 0] * requests
        coupled = [self.params.coupled] * requests
        rounds = [self.round] * requests
        watch = Stopwatch()
        noise = RoundNoise.of(list(range(requests)), rounds, rounds, coupled, slots=slots, greedy=greedy)
        watch.lap()
        sampler = DraftSampler(self.shaping, noise, self.history)
        drawn = [sampler.draw(self.draft_RKV[:, k], k) for k in range(slots)]
        watch.lap()
        tokens, laws = (torch.stack(parts, 1) for parts in zip(*drawn, strict=True))
        draft = Draft(tokens, laws, self.confidence_RK, [slots] * requests)
        watch.restart()  # stacking is the drafter's work
        plan = self.planner.plan(Round(draft.length_R), survival(draft.confidence_RK))
        watch.lap()
        rows = self.history.rows(plan, draft.token_RK) if self.history is not None else None
        target_BV = self.target_BV
        if self.shaping.adjusts:
            target_BV = adjust(target_BV, self.shaping.repeat([1 + n for n in plan]), rows)
        watch.lap()
        verify_logits(draft, plan, target_BV, self.shaping.knobs_R4, noise)
        watch.lap()
        return watch.laps


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self.restart()

    def restart(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> None:
        self.laps.append(time.perf_counter() - self.last)
        self.restart()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=7)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'case':24}{'R':>3}" + "".join(f"{part:>13}" for part in PARTS) + f"{'total':>9}  (us)")
    for requests in arguments.requests:
        cases = {n: Case(p, requests, arguments.slots, arguments.vocabulary) for n, p in CASES.items()}
        times: dict[str, list[list[float]]] = {name: [] for name in cases}
        for _ in range(arguments.repetitions // 10):
            for name, case in cases.items():
                times[name] += [case.run() for _ in range(10)]
        for name, rows in times.items():
            medians = [1e6 * statistics.median(part) for part in zip(*rows, strict=True)]
            print(f"{name:24}{requests:3}" + "".join(f"{m:13.0f}" for m in medians) + f"{sum(medians):9.0f}")


if __name__ == "__main__":
    main()
