"""Streams are functions of their key alone, uniform, and independent across everything that a key is made of."""

import numpy as np
import pytest
import torch

from dspark.common.rng import (
    ACCEPT,
    COUPLED,
    DRAFT,
    RESIDUAL,
    exponential_noise,
    gumbel_noise,
    uniform,
    uniform_array,
)

N = 300


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(N).repeat_interleave(N), torch.arange(N).repeat(N)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """In standard deviations from its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_known_values():
    """splitmix64 of Steele et al. under our keying, worked out with whole numbers in plain Python."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    for seed, counter, stream in [(0, 0, DRAFT), (1, 2, ACCEPT), (2**63 - 1, 2**40 + 3, COUPLED), (12345, 7, RESIDUAL)]:
        bits = mix((mix((seed + stream * golden) % 2**64) + counter * golden) % 2**64)
        found = uniform(torch.tensor([seed]), torch.tensor([counter]), stream)
        assert float(found) == ((bits >> 12) + 0.5) / 2**52
        array = uniform_array(np.array([seed]), np.array([counter]), np.array([stream]))
        assert array[0] == float(found)


@pytest.mark.parametrize("stream", [DRAFT, ACCEPT, RESIDUAL, COUPLED])
def test_uniform_over_neighbouring_keys(stream):
    u = uniform(*grid(), stream)
    assert u.min() > 0 and u.max() < 1
    assert abs(chi_square(torch.histc(u, 1000, 0, 1), torch.full((1000,), N * N / 1000))) < 4


def test_neighbouring_keys_are_independent():
    """Pairs (u, u of the next seed, counter or stream) fill the unit square evenly."""
    seed, counter = grid()
    u = uniform(seed, counter, DRAFT)
    for other in (uniform(seed + 1, counter, DRAFT), uniform(seed, counter + 1, DRAFT), uniform(seed, counter, ACCEPT)):
        cell = (u * 30).long() * 30 + (other * 30).long()
        counts = torch.bincount(cell, minlength=900).double()
        assert abs(chi_square(counts, torch.full((900,), N * N / 900))) < 4


@pytest.mark.parametrize("axis", ["seed", "counter", "token"])
def test_exponentials_are_exponential_and_independent(axis):
    seed = torch.arange(64).repeat_interleave(8)
    noise = exponential_noise(seed, torch.arange(8).repeat(64), 501, COUPLED).view(64, 8, 501).double()
    u = noise.neg().exp()
    assert abs(chi_square(torch.histc(u, 1000, 0, 1), torch.full((1000,), u.numel() / 1000.0))) < 4
    moved = u.roll(1, ["seed", "counter", "token"].index(axis))
    counts = torch.bincount(((u * 40).long() * 40 + (moved * 40).long()).flatten().clamp(0, 1599), minlength=1600)
    assert abs(chi_square(counts.double(), torch.full((1600,), u.numel() / 1600.0))) < 4


def test_small_exponentials_decide_races_and_are_fine_grained():
    """P(e < x) = x for small x: what makes unlikely tokens win as often as they should."""
    noise = exponential_noise(torch.arange(500), torch.zeros(500, dtype=torch.int64), 4096, COUPLED).flatten()
    for bound in (1e-3, 1e-4, 1e-5):
        expected = noise.numel() * bound
        assert abs(int((noise < bound).sum()) - expected) < 4 * expected**0.5
    assert noise.min() > 0 and noise.isfinite().all()
    assert noise.unique().numel() > 0.9 * noise.numel()


def test_a_race_is_won_in_proportion():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = exponential_noise(torch.arange(200_000), torch.arange(200_000) % 7, 4, COUPLED)
    counts = torch.bincount((law / noise).argmax(-1), minlength=4).double()
    assert abs(chi_square(counts, law.double() * 200_000)) < 4


def test_noise_depends_on_the_key_alone():
    """Not on the batch, the order, or how wide the vocabulary is."""
    seed, counter = torch.tensor([5, 9, 2**62]), torch.tensor([0, 1, 77])
    together = exponential_noise(seed, counter, 333, COUPLED)
    assert torch.equal(together.flip(0), exponential_noise(seed.flip(0), counter.flip(0), 333, COUPLED))
    for i in range(3):
        alone = exponential_noise(seed[i : i + 1], counter[i : i + 1], 100, COUPLED)
        assert torch.equal(alone[0], together[i, :100])
    assert torch.equal(gumbel_noise(seed, counter, 333, COUPLED), -together.log())
    assert not torch.equal(together, exponential_noise(seed, counter, 333, DRAFT))
