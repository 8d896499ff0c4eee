"""Streams are functions of their key alone, uniform, and independent across everything that a key is made of."""

import math

import numpy as np
import pytest
import torch

from dspark.common.rng import (
    ACCEPT,
    COUPLED,
    DRAFT,
    RESIDUAL,
    exponential_noise,
    exponential_of_bits,
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


KEYS = [(0, 0, DRAFT), (1, 2, ACCEPT), (2**63 - 1, 2**40 + 3, COUPLED), (12345, 7, RESIDUAL)]


def plain_hash(seed: int, counter: int, stream: int) -> int:
    """splitmix64 of Steele et al. under our keying, with whole numbers in plain Python."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    return mix((mix((seed + stream * golden) % 2**64) + counter * golden) % 2**64)


def plain_exponential(key: int, token: int) -> float:
    """murmur3's finaliser with the low half of the key before and the high half inside."""
    x = token * 0x9E3779B1 % 2**32 ^ key % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x + (key >> 32)) % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    x = x ^ x >> 16
    return -math.log1p(-(x % 2**31 | 1) / 2**31)


def test_exponentials_are_the_hash_in_whole_numbers():
    for seed, counter, stream in KEYS:
        found = exponential_noise(torch.tensor([seed]), torch.tensor([counter]), 400, stream)[0].tolist()
        wanted = [plain_exponential(plain_hash(seed, counter, stream), token) for token in range(400)]
        assert found == pytest.approx(wanted, rel=1e-4)


def test_no_exponential_is_zero_or_infinite():
    """Not even where the hash is 0 or all ones: 0 / 0 would win a race, and p / inf would lose a sure one."""
    assert exponential_of_bits(torch.tensor([0, 2**31 - 1, -1, -(2**31)], dtype=torch.int32)).tolist() == pytest.approx(
        [2.0**-31, 24 * math.log(2), 24 * math.log(2), 2.0**-31], rel=1e-6
    )


def test_known_values():
    for seed, counter, stream in KEYS:
        bits = plain_hash(seed, counter, stream)
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
