"""The law gives on CUDA what it gives on the host: the same uniforms to the bit, the same text in float64."""

import pytest
import torch

from dspark.common.rng import COUPLED, DRAFT, exponential_noise, uniform
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, shape
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise
from dspark.speculation.verify import verify

pytestmark = pytest.mark.gpu
R, K, V = 6, 4, 1000
MANY = [
    SamplingParams(),
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.8, seed=3),
    SamplingParams(top_k=9, temperature=0.6),
    SamplingParams(min_p=0.1, frequency_penalty=0.3),
]


def test_streams():
    seed, counter = torch.arange(1000) * 2**50, torch.arange(1000).flip(0)
    assert torch.equal(uniform(seed, counter, DRAFT), uniform(seed.cuda(), counter.cuda(), DRAFT).cpu())
    host = exponential_noise(seed, counter, V, COUPLED)
    assert torch.allclose(host, exponential_noise(seed.cuda(), counter.cuda(), V, COUPLED).cpu(), rtol=1e-5)


def one_round(device: str) -> tuple[list[list[int]], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    target = 3 * torch.randn(R, K + 1, V, generator=generator, dtype=torch.float64)
    guess = (target[:, :K] + 0.5 * torch.randn(R, K, V, generator=generator, dtype=torch.float64)).to(device)
    shaping, history = Shaping.of(MANY, device), History.of([[1, 2]] * R, [[3]] * R, V, device)
    coupled, greedy = [p.coupled for p in MANY], [p.temperature == 0 for p in MANY]
    noise = RoundNoise.of(range(R), [7] * R, [2] * R, coupled, slots=K, greedy=greedy, device=device)
    sampler = DraftSampler(shaping, noise, history)
    tokens, laws = zip(*(sampler.draw(guess[:, k], k) for k in range(K)), strict=True)
    draft = Draft(torch.stack(tokens, 1), torch.stack(laws, 1), torch.ones(R, K), [K] * R)
    plan = [4, 3, 4, 0, 2, 4]
    rows = torch.cat([target[r, : 1 + n] for r, n in enumerate(plan)]).to(device)
    law_BV = shape(rows, shaping.repeat([1 + n for n in plan]), history.rows(plan, draft.token_RK))
    return verify(draft, plan, law_BV, noise).tokens, law_BV.cpu()


def test_one_round_of_everything():
    (host, host_law), (device, device_law) = one_round("cpu"), one_round("cuda")
    assert torch.allclose(host_law, device_law, atol=1e-13)
    assert host == device
