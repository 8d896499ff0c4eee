"""Causal attention of the newest queries over a dense prefix.

B sequences, Q queries, S keys (the queries' own last), H heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def step_attention(q_BQHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, scale: float) -> Tensor:
    """Query i of Q sees keys up to S − Q + i. Returns [B, Q, H, d]."""
    queries, keys = q_BQHd.shape[1], k_BSGd.shape[1]
    seen_QS = torch.ones(queries, keys, dtype=torch.bool, device=q_BQHd.device).tril(keys - queries)
    q, k, v = (x.transpose(1, 2) for x in (q_BQHd, k_BSGd, v_BSGd))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen_QS, scale=scale, enable_gqa=True).transpose(1, 2)
