"""A slot drawn by the kernel is the slot drawn by tensors: the same tokens, from the same laws."""

import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.ops.cpu import load_kernels
from dspark.ops.history import History
from dspark.ops.sampling import Shaping
from dspark.speculation import draft_sampler
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise

V = 301
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6, top_k=5, seed=4),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(min_p=0.1, seed=9),
    SamplingParams(top_k=40, top_p=0.9, frequency_penalty=0.7),
    SamplingParams(logit_bias={3: 4.0}, repetition_penalty=1.3, temperature=0),
]
needs_kernels = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler: tensors draw every slot")


def drawn(logits_RKV, params, monkeypatch, *, kernel):
    monkeypatch.setattr(draft_sampler, "has_kernel", lambda _: kernel)
    requests = len(params)
    noise = RoundNoise.of(
        [p.seed or r for r, p in enumerate(params)],
        [3] * requests,
        [7] * requests,
        [p.coupled for p in params],
        slots=logits_RKV.shape[1],
        greedy=[p.temperature == 0 for p in params],
    )
    history = History.of([[1, 2]] * requests, [[5, 5, 9]] * requests, V)
    sampler = DraftSampler(Shaping.of(params), noise, history if any(p.penalized for p in params) else None)
    slots = [sampler.draw(logits_RKV[:, slot], slot) for slot in range(logits_RKV.shape[1])]
    return torch.stack([token for token, _ in slots], 1), torch.stack([law for _, law in slots], 1)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [PARAMS, PARAMS[:5], PARAMS[:1] * 3], ids=["all", "no penalties", "plain"])
def test_the_kernel_draws_what_tensors_do(params, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits_RKV = (2 * torch.randn(len(params), 6, V, generator=generator)).to(dtype)
    logits_RKV[:, 1, 100:150] = -torch.inf
    one, two = (drawn(logits_RKV, params, monkeypatch, kernel=kernel) for kernel in (True, False))
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[1], two[1], rtol=1e-4, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(seed=3, top_p=0.9)])
def test_what_is_no_number_gives_the_last_token_and_a_law_that_nothing_passes(params, monkeypatch):
    token, law = drawn(torch.full((1, 2, V), float("nan")), [params], monkeypatch, kernel=True)
    assert token.tolist() == [[V - 1, V - 1]]
    passes = torch.ones(()) / law[0, :, V - 1] >= 0.5  # accept with min(1, p/q) for the best p there is
    assert params.temperature == 0 or not passes.any()
