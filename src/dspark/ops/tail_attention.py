"""Causal attention inside packed documents, for training drafters that step token by token.

B rows, S context tokens, A places, C tokens of a tail, H heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def document_attention(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, start_BS: Tensor, scale: float, *, window: int = 0
) -> Tensor:
    """Every token sees its document up to itself; start_BS is where that begins. Returns [B, S, H, d]."""
    order_S = torch.arange(q_BSHd.shape[1], device=q_BSHd.device)
    seen_BSS = (order_S <= order_S[:, None]) & (order_S >= start_BS[..., None])
    if window:
        seen_BSS &= order_S > order_S[:, None] - window
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BSGd, v_BSGd))
    out_BHSd = scaled_dot_product_attention(q, k, v, attn_mask=seen_BSS[:, None], scale=scale, enable_gqa=True)
    return out_BHSd.transpose(1, 2)


def tail_attention(
    q_BAHd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    tail_k_BACGd: Tensor,
    tail_v_BACGd: Tensor,
    last_BA: Tensor,
    start_BA: Tensor,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """One query a place sees the context in [start, last] and the place's own tail of C tokens that follow it.

    The two kinds of scores are joined before the softmax: no place is multiplied with another's tail. With a
    `window`, positions count on through the tail: the query stands at last + C. Returns [B, A, H, d].
    """
    B, A, H, d = q_BAHd.shape
    (S, G), C = context_k_BSGd.shape[1:3], tail_k_BACGd.shape[2]
    n = H // G
    q_BGAnd = (q_BAHd * scale).view(B, A, G, n, d).transpose(1, 2)
    far_BGAnS = (q_BGAnd.reshape(B, G, A * n, d) @ context_k_BSGd.permute(0, 2, 3, 1)).view(B, G, A, n, S)
    order_S = torch.arange(S, device=last_BA.device)
    hidden_BAS = (order_S > last_BA[..., None]) | (order_S < start_BA[..., None])
    if window:
        hidden_BAS |= order_S <= last_BA[..., None] + C - window
    far_BGAnS = far_BGAnS.masked_fill(hidden_BAS[:, None, :, None], float("-inf"))
    near_BGAnC = q_BGAnd @ tail_k_BACGd.permute(0, 3, 1, 4, 2)
    if window and window < C:
        near_BGAnC[..., : C - window] = float("-inf")
    weight = torch.cat((far_BGAnS, near_BGAnC), dim=-1).softmax(-1, dtype=torch.float32).to(q_BAHd.dtype)
    far_BGAnS, near_BGAnC = weight.split((S, C), dim=-1)
    out_BGAnd = (far_BGAnS.reshape(B, G, A * n, S) @ context_v_BSGd.transpose(1, 2)).view(B, G, A, n, d)
    out_BGAnd = out_BGAnd + near_BGAnC @ tail_v_BACGd.permute(0, 3, 1, 2, 4)
    return out_BGAnd.transpose(1, 2).reshape(B, A, H, d)
