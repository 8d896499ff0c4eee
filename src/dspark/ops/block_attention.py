"""Attention of many draft blocks over one sequence, dense, for training.

B sequences, S context tokens, A anchors, K block slots, H heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention(
    q_BAKHd: Tensor,
    k_BAKGd: Tensor,
    v_BAKGd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    anchor_BA: Tensor,
    start_BA: Tensor,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """Block a attends to its own K slots, both ways, and to the context in [start, anchor) of it (DFlash, §3).

    The scores against the context and those inside the block are two matrix products joined before the softmax, so
    that no block is multiplied with another block's keys. With a `window`, slot k sees context newer than
    anchor + k − window. Returns [B, A, K, H, d].
    """
    B, A, K, H, d = q_BAKHd.shape
    S, G = context_k_BSGd.shape[1:3]
    n = H // G
    q_BGnAKd = (q_BAKHd * scale).view(B, A, K, G, n, d).permute(0, 3, 4, 1, 2, 5)
    far_BGnAKS = (q_BGnAKd.reshape(B, G, -1, d) @ context_k_BSGd.permute(0, 2, 3, 1)).view(B, G, n, A, K, S)
    near_BGnAKK = q_BGnAKd @ k_BAKGd.permute(0, 3, 1, 4, 2)[:, :, None]

    order_S = torch.arange(S, device=anchor_BA.device)
    hidden_BAKS = ((order_S >= anchor_BA[:, :, None]) | (order_S < start_BA[:, :, None]))[:, :, None]
    if window:
        position_BAK = anchor_BA[:, :, None] + torch.arange(K, device=anchor_BA.device)
        hidden_BAKS = hidden_BAKS | (order_S <= position_BAK[..., None] - window)
    far_BGnAKS = far_BGnAKS.masked_fill(hidden_BAKS[:, None, None], float("-inf"))

    weight = torch.cat((far_BGnAKS, near_BGnAKK), dim=-1).softmax(-1, dtype=torch.float32).to(q_BAKHd.dtype)
    far_BGnAKS, near_BGnAKK = weight.split((S, K), dim=-1)
    out = (far_BGnAKS.reshape(B, G, -1, S) @ context_v_BSGd.transpose(1, 2)).view(B, G, n, A, K, d)
    out = out + near_BGnAKK @ v_BAKGd.permute(0, 3, 1, 2, 4)[:, :, None]
    return out.permute(0, 3, 4, 1, 2, 5).reshape(B, A, K, H, d)
