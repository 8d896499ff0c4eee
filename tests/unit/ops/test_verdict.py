"""The round kernel of both rules decides what its plain twin decides."""

import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.ops.cpu import load_kernels
from dspark.ops.races import race_keys
from dspark.ops.sampling import Shaping
from dspark.ops.verdict import verdict, verdict_plain

R, K, V = 60, 4, 37
CUTS = ({"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}, {})


def knobs_of(temperature, requests, **cuts):
    return Shaping.of([SamplingParams(temperature=temperature, **cuts)] * requests).knobs_R4


def case(dtype, seed, cuts=({},)):
    generator = torch.Generator().manual_seed(seed)
    plan = torch.randint(0, K + 1, (R,), generator=generator).tolist()
    logits = (2 * torch.randn(sum(plan) + R, V, generator=generator)).to(dtype)
    logits[::3, 5] = logits[::3].max(1).values  # ties at the top
    logits[1::4, 7:20] = float("-inf")
    params = [SamplingParams(temperature=(0.0, 1.0, 0.6)[r % 3], **cuts[r % len(cuts)]) for r in range(R)]
    knobs = Shaping.of(params).knobs_R4
    q = torch.softmax(torch.randn(R, K, V, generator=generator), 2)
    token = torch.distributions.Categorical(q).sample()
    starts = torch.tensor([0, *plan]).cumsum(0)[:-1] + torch.arange(R)
    for r in range(R):  # most drafts are good ones, so that rounds get past the first slot
        for k in range(min(plan[r], K - 1)):
            token[r, k] = logits[starts[r] + k].float().argmax()
        if params[r].temperature == 0:
            q[r] = torch.nn.functional.one_hot(token[r], V).float()
    uniform = torch.rand(R, K + 1, generator=generator, dtype=torch.float64)
    return logits, plan, token, q, knobs, uniform[:, :K], uniform[:, K]


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("raced", ["none", "some", "all"])
@pytest.mark.parametrize("cuts", [({},), CUTS], ids=["whole", "truncated"])
def test_kernel_equals_its_plain_twin(dtype, seed, raced, cuts):
    requests = {"none": None, "some": range(0, R, 2), "all": range(R)}[raced]
    key = None if requests is None else race_keys(range(R), range(R), requests, K + 1)
    arguments = (*case(dtype, seed, cuts), key)
    want, got = verdict_plain(*arguments), verdict(*arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert len(set(got[0].tolist())) > 2, "rounds of different lengths"


@pytest.mark.parametrize("run", [verdict_plain, verdict])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("raced", [True, False])
def test_logits_that_are_no_numbers_give_no_token(run, dtype, temperature, bad, raced):
    one = knobs_of(temperature, 4), torch.full((4, 1), 0.5).double(), torch.tensor([0.5] * 4).double()
    token, law = torch.zeros(4, 1, dtype=torch.long), torch.eye(V)[[0] * 4].unsqueeze(1).contiguous()
    logits = torch.zeros(8, V)
    logits[:, 0] = 40.0  # every draft is token 0; the last one is rejected
    logits[6] = logits[6].roll(1)
    logits[0] = bad  # a whole row
    logits[3, V - 1] = bad  # one entry, after an accepted draft
    logits[7, 3] = bad  # after a rejected one: nobody looks at it
    key = race_keys([3] * 4, [0] * 4, range(4), 2) if raced else None
    accepted, last = run(logits.to(dtype), [1] * 4, token, law, *one, key)
    assert last.tolist() == [V, V, 0, 1] and accepted.tolist()[1:] == [1, 1, 0]


@pytest.mark.parametrize("run", [verdict_plain, verdict])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_a_model_rules_out_are_no_fault(run, temperature):
    logits = torch.full((2, V), -float("inf"))
    logits[0, 2] = 0.0
    nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, V)
    one = knobs_of(temperature, 2), torch.zeros(2, 0).double(), torch.tensor([0.5] * 2).double()
    assert run(logits, [0, 0], *nothing, *one)[1].tolist() == [2, V]  # all of them is one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raced", [True, False])
def test_committed_tokens_follow_the_target(dtype, raced):
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
        knobs_of(0.8, rounds),
        u[:, :1],
        u[:, 1],
        race_keys(range(rounds), [1] * rounds, range(rounds), 2) if raced else None,
    )
    first = torch.where(accepted == 1, drawn, last)
    expected = torch.softmax(row.double() / 0.8, 0) * rounds
    counted = torch.bincount(first, minlength=tokens)
    assert float(((counted - expected) ** 2 / expected).sum()) < 38  # 5 degrees of freedom


@pytest.mark.parametrize("run", [verdict_plain, verdict])
def test_a_race_is_lost_by_no_draft_that_ran_it_too(run):
    """Under the coupled rule a draft from the target's own law is accepted whole, whatever the numbers."""
    logits, plan, token, q, knobs, accept, final = case(torch.float32, 0)
    key = race_keys(range(R), range(R), range(R), K + 1)
    starts = torch.tensor([0, *plan]).cumsum(0)[:-1] + torch.arange(R)
    empty = torch.zeros(R, 0, dtype=torch.long), torch.zeros(R, 0, V)
    for k in range(K):
        rows = logits[torch.minimum(starts + k, torch.tensor(len(logits) - 1))]
        none = (knobs, accept[:, :0], final, key[:, k : k + 1].contiguous())
        token[:, k] = run(rows, [0] * R, *empty, *none)[1]
    accepted, _ = run(logits, plan, token, q, knobs, accept, final, key)
    assert accepted.tolist() == plan
