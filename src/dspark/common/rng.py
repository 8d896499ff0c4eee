"""Random streams without state: a number depends only on (seed, counter, stream), never on device, batch or order.

B draws, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

DRAFT, ACCEPT, RESIDUAL, COUPLED, ANCHORS = 1, 2, 3, 4, 5  # streams: independent numbers for the same seed and counter

_Int64 = TypeVar("_Int64", Tensor, np.ndarray)


def _signed(value: int, bits: int = 64) -> int:
    """The two's complement reading of an unsigned constant; tensors know signed integers only."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_LANE = _signed(0x9E3779B1, 32)
_FMIX_1, _FMIX_2 = _signed(0x85EBCA6B, 32), _signed(0xC2B2AE35, 32)
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 under 1


def _mix(x: _Int64) -> _Int64:
    """The 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014); masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hash64(seed: _Int64, counter: _Int64, stream: _Int64 | int) -> _Int64:
    """64 random bits per element: a splitmix64 sequence whose start is a hash of seed and stream.

    Works alike on int64 tensors and int64 arrays (products wrap in both); the three broadcast.
    """
    offset = _signed(stream * _GOLDEN % 2**64) if isinstance(stream, int) else stream * _GOLDEN
    return _mix(_mix(seed + offset) + counter * _GOLDEN)


def uniform(seed_B: Tensor, counter_B: Tensor, stream: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64 [B], on a grid of odd multiples of 2^-53."""
    bits_B = (hash64(seed_B, counter_B, stream) >> 12) & 0xFFFFFFFFFFFFF
    return (bits_B.double() + 0.5) * 2.0**-52


def uniform_array(seed: np.ndarray, counter: np.ndarray, stream: np.ndarray | int) -> np.ndarray:
    """`uniform` for int64 arrays on the host, bit for bit; arguments broadcast, `stream` may be an array."""
    bits = (hash64(seed, counter, stream) >> 12) & 0xFFFFFFFFFFFFF
    return (bits + 0.5) * 2.0**-52


@functools.lru_cache(maxsize=16)
def _lanes(vocabulary: int, device: torch.device) -> Tensor:
    return torch.arange(vocabulary, dtype=torch.int32, device=device).mul_(_LANE)


def exponential_noise(seed_B: Tensor, counter_B: Tensor, vocabulary: int, stream: int) -> Tensor:
    """Unit exponentials, float32 [B, V]: entry v depends on (seed, counter, stream, v) only."""
    return exponentials_of(hash64(seed_B, counter_B, stream), vocabulary)


def exponentials_of(key_B: Tensor, vocabulary: int) -> Tensor:
    """Unit exponentials, float32 [B, V], all in [2^-31, 16.7]; entry v depends on the row's 64-bit key and v only.

    argmin_v e_v / p_v is distributed as p, and equals argmax_v (log p_v + g_v) for the Gumbel noise g = -log e.
    The hash is murmur3's 32-bit finaliser with 64 key bits, half before and half inside, so that no two rows are
    permutations of each other. Small e decide the race, so they are the finely spaced ones.
    """
    key_B1 = key_B.unsqueeze(1)
    x_BV = _lanes(vocabulary, key_B.device) ^ key_B1.to(torch.int32)  # the cast keeps the low 32 bits
    x_BV ^= (x_BV >> 16).bitwise_and_(0xFFFF)
    x_BV *= _FMIX_1
    x_BV += (key_B1 >> 32).to(torch.int32)
    x_BV ^= (x_BV >> 13).bitwise_and_(0x7FFFF)
    x_BV *= _FMIX_2
    x_BV ^= (x_BV >> 16).bitwise_and_(0xFFFF)
    return exponential_of_bits(x_BV)


def exponential_of_bits(x_BV: Tensor) -> Tensor:
    """-log(1 - u) for u = the low 31 bits of an int32 tensor, the last one set, over 2^31; overwrites its argument.

    The midpoints of 2^30 cells: u is never 0, and rounded to float32 never 1.
    """
    x_BV &= 0x7FFFFFFF
    x_BV |= 1
    return x_BV.to(torch.float32).mul_(-_BELOW_ONE * 2.0**-31).log1p_().neg_()


def gumbel_noise(seed_B: Tensor, counter_B: Tensor, vocabulary: int, stream: int) -> Tensor:
    """Standard Gumbel noise, float32 [B, V]: -log of `exponential_noise`."""
    return exponential_noise(seed_B, counter_B, vocabulary, stream).log_().neg_()
