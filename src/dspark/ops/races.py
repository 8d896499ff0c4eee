"""What the coupled rule chooses by: keys that a seed and a place fix, and the exponentials that a key fixes.

R requests, B keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.common.rng import COUPLED, exponentials_of, hash64
from dspark.ops.cpu import load_kernels


def race_keys(seeds: Sequence[int], positions: Sequence[int], raced: Sequence[int], width: int) -> Tensor:
    """Keys of the requests `raced` at positions[r] .. + width - 1, int64 [R, width] on the host; 0 for the others."""
    if load_kernels():
        return torch.ops.dspark.race_keys.default(seeds, positions, raced, width, COUPLED)
    return race_keys_plain(seeds, positions, raced, width)


def race_keys_plain(seeds: Sequence[int], positions: Sequence[int], raced: Sequence[int], width: int) -> Tensor:
    """The specification of the kernel, bit for bit. A key is never 0: one hash in 2^64 becomes 1."""
    rows = list(raced)
    seed_C1, position_C1 = (np.array(numbers, dtype=np.int64)[rows, None] for numbers in (seeds, positions))
    key_CK = hash64(seed_C1, position_C1 + np.arange(width), COUPLED)
    key_RK = np.zeros((len(seeds), width), dtype=np.int64)
    key_RK[rows] = np.where(key_CK == 0, 1, key_CK)
    return torch.from_numpy(key_RK)


def exponentials(key_B: Tensor, vocabulary: int) -> Tensor:
    """Unit exponentials, float32 [B, V]: `common.rng.exponentials_of`; the kernel's are as near to the true ones."""
    if key_B.device.type == "cpu" and load_kernels():
        return torch.ops.dspark.exponentials.default(key_B, vocabulary)
    return exponentials_of(key_B, vocabulary)
