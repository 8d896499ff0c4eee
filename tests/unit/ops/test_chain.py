"""The fused sequential head draws what its plain twin draws, from the law it reports."""

import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.ops.chain import draft_chain, draft_chain_plain
from dspark.ops.cpu import load_kernels
from dspark.ops.draws import Draws
from dspark.ops.linear import pack
from dspark.ops.races import race_keys
from dspark.ops.sampling import Shaping

R, K, V, RANK = 5, 4, 97, 24
UNCUT = ({}, {}, {}, {}, {})
CUTS = ({"top_k": 3}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.8}, {})


def case(dtype, cuts=UNCUT):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    base = normal(R, K, V)
    base[:, :, 40] = base[:, :, 41]  # equals: the lower token comes first
    anchor = torch.randint(0, V, (R,), generator=generator)
    uniform = torch.rand(R, K, generator=generator, dtype=torch.float64)
    params = [SamplingParams(temperature=t, **cut) for t, cut in zip((0.0, 1.0, 0.3, 2.0, 0.0), cuts, strict=True)]
    return base, normal(V, RANK), normal(V, RANK), anchor, Shaping.of(params).knobs_R4, uniform


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 1, 7, 96, 200])
@pytest.mark.parametrize("sees_token", [True, False])
@pytest.mark.parametrize("with_packed", [True, False])
@pytest.mark.parametrize("raced", [True, False])
@pytest.mark.parametrize("cuts", [UNCUT, CUTS], ids=["whole", "truncated"])
def test_kernel_equals_its_plain_twin(dtype, top, sees_token, with_packed, raced, cuts):
    base, w1, w2, anchor, knobs, uniform = case(dtype, cuts)
    confidence = torch.randn(R, K)
    weight = torch.randn(RANK) if sees_token else torch.empty(0)
    key = race_keys(range(R), [4] * R, [0, 1, 3, 4], K) if raced else None
    want = draft_chain_plain(base, w1, w2, anchor, knobs, uniform, key, top, confidence, weight)
    packed = pack(w2) if with_packed else None
    got = draft_chain(base, w1, w2, anchor, Draws(knobs, uniform, key), top, confidence, weight, packed)
    assert torch.equal(got[0], want[0])
    halves = (
        with_packed and dtype == torch.bfloat16
    )  # sums may be float16 for a while (packed.h); 0.3 heats the difference
    torch.testing.assert_close(got[1], want[1], rtol=6e-2 if halves else 1e-4, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1].sum(2), torch.ones(R, K))
    if 0 < top < V:
        assert ((got[1] > 0).sum(2) <= top).all()


@pytest.mark.parametrize("raced", [True, False])
@pytest.mark.parametrize("top", [9, 0])
def test_tokens_follow_the_reported_law(top, raced):
    """Chi-square of 20 000 first-slot draws, by uniforms and by races."""
    base, w1, w2, *_ = case(torch.float32)
    draws = 20_000
    uniform = torch.rand(draws, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    knobs = Shaping.of([SamplingParams(temperature=1.3)]).knobs_R4.expand(draws, 4)
    anchor = torch.full((draws,), 3)
    no_confidence = (torch.zeros(draws, 1), torch.empty(0))
    key = race_keys(range(draws), [0] * draws, range(draws), 1) if raced else None
    packed = pack(w2) if load_kernels() and not top else None
    one = base[:1, :1].expand(draws, 1, V).contiguous()
    token, law, _ = draft_chain(one, w1, w2, anchor, Draws(knobs, uniform, key), top, *no_confidence, packed)
    expected = law[0, 0].double() * draws
    counted = torch.bincount(token[:, 0], minlength=V).double()
    kept = expected > 0
    assert kept.sum() == (top or V)
    assert counted[~kept].sum() == 0
    statistic = ((counted - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert statistic < {9: 45.0, 0: 178.0}[top]  # 8 and 96 degrees of freedom: 1e-6 beyond 43 and 172
