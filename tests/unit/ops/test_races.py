"""Keys and exponentials of races by kernel are those of their plain twins."""

import pytest
import torch

from dspark.common.rng import COUPLED, exponential_noise, exponentials_of
from dspark.ops.cpu import load_kernels
from dspark.ops.races import exponentials, race_keys, race_keys_plain

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")
SEEDS, POSITIONS = [3, -5, 2**63 - 1, -(2**63)], [0, 10, 2**40, 7]


@needs_kernels
@pytest.mark.parametrize("raced", [[], [1], [0, 2, 3]])
def test_keys_equal_their_twins_and_are_nothing_for_those_who_draw(raced):
    keys = race_keys(SEEDS, POSITIONS, raced, 4)
    assert torch.equal(keys, race_keys_plain(SEEDS, POSITIONS, raced, 4))
    assert [bool(row.all()) for row in keys] == [r in raced for r in range(4)]
    assert all(not keys[r].any() for r in range(4) if r not in raced)


def test_a_key_fixes_the_noise_of_its_seed_and_position():
    (key,) = race_keys([11], [5], [0], 3)
    want = exponential_noise(torch.tensor([11] * 3), torch.arange(5, 8), 100, COUPLED)
    assert torch.equal(exponentials_of(key, 100), want)


@needs_kernels
@pytest.mark.parametrize("vocabulary", [1, 16, 5001])
def test_exponentials_equal_their_twins(vocabulary):
    key = torch.randint(-(2**63), 2**63 - 1, (200,), generator=torch.Generator().manual_seed(0))
    got, want = exponentials(key, vocabulary), exponentials_of(key, vocabulary)
    torch.testing.assert_close(got, want, rtol=5e-7, atol=0.0)
    assert got.min() > 0 and torch.equal(got[7:9], exponentials(key[7:9], vocabulary))
