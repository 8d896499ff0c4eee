"""Uniform numbers of many seeds at once, each a function of its seed, counter and stream alone.

R seeds, N numbers each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.common.rng import uniform_array
from dspark.ops.cpu import load_kernels


def uniforms(seeds: Sequence[int], counters: Sequence[int], offsets: Sequence[int], streams: Sequence[int]) -> Tensor:
    """Number i of seed r at counter r + offset i in stream i: float64 [R, N] in (0, 1), on the host."""
    if load_kernels():
        return torch.ops.dspark.uniforms.default(seeds, counters, offsets, streams)
    return uniforms_plain(seeds, counters, offsets, streams)


def uniforms_plain(
    seeds: Sequence[int], counters: Sequence[int], offsets: Sequence[int], streams: Sequence[int]
) -> Tensor:
    """The specification of the kernel, bit for bit."""
    seed_R1, counter_R1 = (np.array(numbers, dtype=np.int64)[:, None] for numbers in (seeds, counters))
    return torch.from_numpy(uniform_array(seed_R1, counter_R1 + np.array(offsets), np.array(streams)))
