"""Survival: the chance that a whole prefix of a draft is accepted, from the confidences of its tokens.

R requests, K draft slots.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def survival(confidence_RK: Tensor) -> Tensor:
    """a_k = c_1 · … · c_k, [R, K]: the estimated probability that slots 1..k are all accepted. (DSpark, eq. 8)"""
    return confidence_RK.cumprod(1)


def expected_tokens(survival_RK: Tensor, plan: Sequence[int]) -> Tensor:
    """Expected committed tokens of a round under a plan, bonus included: 1 + sum of a_j for j up to ℓ_r, [R]."""
    length_R1 = survival_RK.new_tensor(plan).unsqueeze(1)
    slot_K = survival_RK.new_tensor(range(survival_RK.shape[1]))
    return 1.0 + (survival_RK * (slot_K < length_R1)).sum(1)
