"""The checker can fail: a plan that looks at the token it decides about is caught, its early-stopping twin passes.

DSpark, appendix A: V = {A, B}, p = (0.7, 0.3), q = (0.5, 0.5), SPS(1..3) = (1, 0.5, 0.45), c_1 = 0.8 and
c_2 = 0.9 after A, 0 after B.
"""

import pytest
import torch
from exact import System, joint_law
from tiny_world import ToyDrafter

from dspark.common.sampling_params import SamplingParams

SPEED = (1.0, 0.5, 0.45)  # engine steps per second when 1, 2, 3 tokens are verified


class CoinDrafter(ToyDrafter):
    def logits(self, committed, drafted):
        return torch.tensor([0.5, 0.5], dtype=torch.float64).log()

    def confidence(self, committed, drafted):
        return 0.8 if not drafted else (0.9, 0.0)[drafted[0]]


class GlobalArgmax:
    """The best of all plans, by throughput: leaky, since the worth of slot 2 tells what slot 1 holds."""

    def slots(self, round):
        return list(round.limit_R)

    def throughputs(self, row):
        tokens = [1.0]
        for a in row.tolist():
            tokens.append(tokens[-1] + a)
        return [t * s for t, s in zip(tokens, SPEED, strict=True)]

    def plan(self, round, survival_RK):
        return [max(range(len(SPEED)), key=self.throughputs(row).__getitem__) for row in survival_RK]


class EarlyStop(GlobalArgmax):
    """DSpark, alg. 1: stop at the first admission that does not raise the throughput."""

    def plan(self, round, survival_RK):
        plans = []
        for row in survival_RK:
            rate = self.throughputs(row)
            worse = [k for k in range(1, len(rate)) if rate[k] <= rate[k - 1]]
            plans.append(worse[0] - 1 if worse else len(rate) - 1)
        return plans


@pytest.mark.parametrize(("planner", "law"), [(GlobalArgmax(), (0.85, 0.15)), (EarlyStop(), (0.7, 0.3))])
def test_appendix_a(planner, law):
    target = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    system = System(lambda tokens: target, CoinDrafter(), planner, SamplingParams(), prompt=[0])
    found = joint_law(system, 1)
    assert found[(0,)] == pytest.approx(law[0], abs=1e-12)
    assert found[(1,)] == pytest.approx(law[1], abs=1e-12)
