"""The round kernel of the rejection rule decides what its plain twin decides."""

import pytest
import torch

from dspark.ops.cpu import load_kernels
from dspark.ops.verdict import verdict, verdict_plain

R, K, V = 60, 4, 37


def case(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = torch.randint(0, K + 1, (R,), generator=generator).tolist()
    logits = (2 * torch.randn(sum(plan) + R, V, generator=generator)).to(dtype)
    logits[::3, 5] = logits[::3].max(1).values  # ties at the top
    logits[1::4, 7:20] = float("-inf")
    temperature = torch.tensor([0.0, 1.0, 0.6], dtype=torch.float64)[torch.arange(R) % 3]
    q = torch.softmax(torch.randn(R, K, V, generator=generator), 2)
    token = torch.distributions.Categorical(q).sample()
    starts = torch.tensor([0, *plan]).cumsum(0)[:-1] + torch.arange(R)
    for r in range(R):  # most drafts are good ones, so that rounds get past the first slot
        for k in range(min(plan[r], K - 1)):
            token[r, k] = logits[starts[r] + k].float().argmax()
        if temperature[r] == 0:
            q[r] = torch.nn.functional.one_hot(token[r], V).float()
    uniform = torch.rand(R, K + 1, generator=generator, dtype=torch.float64)
    return logits, plan, token, q, temperature, uniform[:, :K], uniform[:, K]


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_kernel_equals_its_plain_twin(dtype, seed):
    arguments = case(dtype, seed)
    want, got = verdict_plain(*arguments), verdict(*arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert len(set(got[0].tolist())) > 2, "rounds of different lengths"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(temperature):
    logits = torch.full((1, V), float("nan"))
    nothing = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, V)
    one = torch.tensor([temperature]).double(), torch.zeros(1, 0).double(), torch.tensor([0.5]).double()
    assert int(verdict(logits, [0], *nothing, *one)[1]) == V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_committed_tokens_follow_the_target(dtype):
    """Chi-square over 30 000 one-slot rounds; the bound is beyond the 1 - 1e-6 quantile."""
    generator = torch.Generator().manual_seed(0)
    rounds, tokens = 30_000, 6
    row = torch.randn(tokens, generator=generator).to(dtype)
    q = torch.softmax(torch.randn(tokens, generator=generator), 0)
    drawn = torch.multinomial(q, rounds, replacement=True, generator=generator)
    u = torch.rand(rounds, 2, generator=generator, dtype=torch.float64)
    accepted, last = verdict(
        row.expand(2 * rounds, tokens),
        [1] * rounds,
        drawn[:, None],
        q.expand(rounds, 1, tokens),
        torch.full((rounds,), 0.8, dtype=torch.float64),
        u[:, :1],
        u[:, 1],
    )
    first = torch.where(accepted == 1, drawn, last)
    expected = torch.softmax(row.double() / 0.8, 0) * rounds
    counted = torch.bincount(first, minlength=tokens)
    assert float(((counted - expected) ** 2 / expected).sum()) < 38  # 5 degrees of freedom
