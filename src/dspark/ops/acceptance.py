"""The two formulas of the rejection rule (Leviathan et al. 2023, Chen et al. 2023), as pure functions of p and q.

B rows, V vocabulary; p is the target's law at a position, q the law the draft token was drawn from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_probability(p_BV: Tensor, q_BV: Tensor, token_B: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of each drafted token x, [B]; 1 where p(x) > 0 = q(x), and 0 where both are 0."""
    token_B1 = token_B.unsqueeze(1)
    p_B, q_B = p_BV.gather(1, token_B1).squeeze(1), q_BV.gather(1, token_B1).squeeze(1)
    return (p_B / q_B).clamp(max=1.0).nan_to_num(nan=0.0)


def accepts(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Whether u < min(1, p(x) / q(x)), elementwise on the drafted tokens' probabilities; u in (0, 1)."""
    return uniform * q < p


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """normalize(max(p - q, 0)), [B, V]: the law of the token committed at a rejection.

    Where p never exceeds q the two are equal up to rounding (or q is not a number); a rejection then has
    probability about zero and p itself takes its place.
    """
    excess_BV = (p_BV - q_BV).clamp_(min=0.0)
    mass_B1 = excess_BV.sum(-1, keepdim=True)
    return torch.where(mass_B1 > 0, excess_BV / mass_B1, p_BV)
