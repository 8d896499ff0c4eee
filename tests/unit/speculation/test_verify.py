"""verify on ragged batches: prefix rule, alignment of rows, host results, and what is not made when not needed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.common.rng import ACCEPT, COUPLED, DRAFT, RESIDUAL, exponential_noise, uniform
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.ops.sampling import Shaping
from dspark.speculation import noise as noise_module
from dspark.speculation.draft_sampler import DraftSampler
from dspark.speculation.noise import RoundNoise
from dspark.speculation.verify import NoNumbers, sound, verify

V = 5


def random_draft(requests: int, slots: int, generator: torch.Generator) -> Draft:
    token_RK = torch.randint(0, V, (requests, slots), generator=generator)
    law_RKV = torch.rand(requests, slots, V, generator=generator).softmax(-1)
    return Draft(token_RK, law_RKV, torch.ones(requests, slots), [slots] * requests)


def make_noise(requests: int, slots: int, counter: int, coupled: list[bool] | None = None) -> RoundNoise:
    coupled = coupled or [False] * requests
    return RoundNoise.of(range(requests), [counter] * requests, [counter] * requests, coupled, slots=slots)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 10**6), st.data())
def test_a_batch_is_its_requests_one_by_one(plan, seed, data):
    generator = torch.Generator().manual_seed(seed)
    requests, slots = len(plan), 4
    coupled = data.draw(st.lists(st.booleans(), min_size=requests, max_size=requests))
    draft = random_draft(requests, slots, generator)
    target_BV = (2 * torch.rand(sum(plan) + requests, V, generator=generator)).softmax(-1)
    noise = make_noise(requests, slots, seed, coupled)
    verdict = verify(draft, plan, target_BV, noise)
    start = 0
    for r, length in enumerate(plan):
        rows = target_BV[start : start + 1 + length]
        alone = Draft(draft.token_RK[[r]], draft.probability_RKV[[r]], draft.confidence_RK[[r]], [slots])
        single = verify(alone, [length], rows, noise.select([r]))
        assert single.tokens[0] == verdict.tokens[r] and single.accepted_R[0] == verdict.accepted_R[r]
        accepted = verdict.accepted_R[r]
        assert 0 <= accepted <= length and len(verdict.tokens[r]) == accepted + 1
        assert verdict.tokens[r][:accepted] == draft.token_RK[r, :accepted].tolist()
        if accepted < length:
            assert verdict.tokens[r][-1] != draft.token_RK[r, accepted]
        start += 1 + length


def test_certain_drafts_pass_and_impossible_ones_fail():
    law = torch.eye(V)[[1, 2, 3]]
    draft = Draft(torch.tensor([[1, 2]]), law[:2].unsqueeze(0), torch.ones(1, 2), [2])
    assert verify(draft, [2], law, make_noise(1, 2, 0)).tokens == [[1, 2, 3]]
    assert verify(draft, [1], law[:2], make_noise(1, 2, 0)).tokens == [[1, 2]]
    assert verify(draft, [2], torch.eye(V)[[0, 3, 3]], make_noise(1, 2, 0)).tokens == [[0]]
    assert verify(draft, [2], torch.eye(V)[[1, 4, 3]], make_noise(1, 2, 0)).tokens == [[1, 4]]
    assert verify(None, [0], law[:1], make_noise(1, 0, 0)).tokens == [[1]]


def test_a_drafter_that_gives_no_numbers_is_plain_decoding():
    noise = make_noise(1, 2, 3)
    sampler = DraftSampler(Shaping.of([SamplingParams()]), noise)
    drawn = [sampler.draw(torch.full((1, V), math.nan), k) for k in range(2)]
    assert all(0 <= int(token) < V for token, _ in drawn)
    draft = Draft(torch.stack([t for t, _ in drawn], 1), torch.stack([q for _, q in drawn], 1), torch.ones(1, 2), [2])
    law = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).repeat(3, 1)
    assert verify(draft, [2], law, noise).tokens == verify(None, [0], law[:1], noise).tokens


def test_a_target_that_gives_no_numbers_is_an_error():
    with pytest.raises(FloatingPointError, match="not numbers"):
        verify(None, [0], torch.full((1, V), math.nan), make_noise(1, 0, 0))


def test_rows_known_to_be_no_numbers_are_an_error_of_their_requests():
    """Whether the row decides about a draft, gives the last token, or lies behind it."""
    draft = Draft(torch.tensor([[1, 2]] * 4), torch.eye(V)[[1, 2]].repeat(4, 1, 1), torch.ones(4, 2), [2] * 4)
    law = torch.eye(V)[[1, 2, 3] * 3 + [0, 2, 3]]  # the last request rejects its first draft
    for coupled in (False, True):
        noise = RoundNoise.of([0] * 4, [0] * 4, [0] * 4, [coupled] * 4, slots=2)
        sound_B = torch.ones(12, dtype=torch.bool)
        sound_B[[3, 8, 10, 11]] = False
        with pytest.raises(NoNumbers) as failed:
            verify(draft, [2] * 4, law, noise, sound_B)
        assert failed.value.places == [1, 2]
        sound_B[[3, 8]] = True
        assert verify(draft, [2] * 4, law, noise, sound_B).tokens == [[1, 2, 3]] * 3 + [[0]]


def test_sound_rows():
    x = torch.zeros(5, V)
    x[0, 1], x[1, 1], x[2, 1], x[3] = math.nan, math.inf, -math.inf, 1e30
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert sound(x.to(dtype)).tolist() == [False, False, True, True, True]


def test_noise_keys():
    """Rejection numbers are keyed by (seed, counter · 4096 + slot), the coupled ones by (seed, output position)."""
    noise = RoundNoise.of([7, 8], [5, 6], [11, 12], [False, True], slots=3)
    seed = torch.tensor([7, 8])
    for slot in range(3):
        counter = torch.tensor([5, 6]) * 4096 + slot
        assert torch.equal(noise.draft_RK[:, slot], uniform(seed, counter, DRAFT))
        assert torch.equal(noise.accept_RK[:, slot], uniform(seed, counter, ACCEPT))
    assert torch.equal(noise.final_R, uniform(seed, torch.tensor([5, 6]) * 4096, RESIDUAL))
    wanted = exponential_noise(torch.tensor([8] * 4), torch.arange(12, 16), V, COUPLED)
    torch.testing.assert_close(noise.exponential(V)[0], wanted, rtol=5e-7, atol=0.0)  # by a kernel, where there is one


def test_no_vocabulary_noise_without_need(monkeypatch):
    """Not for rejection requests, and not for coupled ones at temperature 0."""
    monkeypatch.setattr(noise_module, "exponentials", None)
    generator = torch.Generator().manual_seed(0)
    draft, target_BV = random_draft(2, 2, generator), torch.eye(V)[[0, 1, 2, 3, 4, 0]]
    for coupled, greedy in (([False, False], [False, True]), ([True, False], [True, False]), ([True] * 2, [True] * 2)):
        noise = RoundNoise.of([0, 1], [0, 0], [0, 0], coupled, slots=2, greedy=greedy)
        DraftSampler(Shaping.of([SamplingParams(temperature=0)] * 2), noise).draw(torch.zeros(2, V), 0)
        verify(draft, [2, 2], target_BV, noise)


def test_selected_noise_is_the_same_noise():
    noise = make_noise(4, 3, 9, [True, False, True, True])
    whole = noise.exponential(V)
    early = make_noise(4, 3, 9, [True, False, True, True]).select([3, 1, 0])
    for picked in (noise.select([3, 1, 0]), early):
        assert picked.coupled == [0, 2]
        assert torch.equal(picked.exponential(V), whole[[2, 0]])
        assert torch.equal(picked.accept_RK, noise.accept_RK[[3, 1, 0]])
