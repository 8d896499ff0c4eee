"""Causal attention inside packed documents, for training drafters that step token by token.

B rows, S context tokens, A places, C tokens of a tail, H heads, G key/value heads, d head size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

MOST_SCORES = 1 << 27  # half a gigabyte in float32


def document_attention(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, start_BS: Tensor, scale: float, *, window: int = 0
) -> Tensor:
    """Every token sees its document up to itself; start_BS is where that begins. Returns [B, S, H, d]."""
    order_S = torch.arange(q_BSHd.shape[1], device=q_BSHd.device)
    seen_BSS = (order_S <= order_S[:, None]) & (order_S >= start_BS[..., None])
    if window:
        seen_BSS &= order_S > order_S[:, None] - window
    heads = q_BSHd.shape[2] // k_BSGd.shape[2]
    # repeated heads instead of `enable_gqa`: with a mask, CUDA's kernels that keep no scores know no other
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, *(x.repeat_interleave(heads, dim=2) for x in (k_BSGd, v_BSGd))))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen_BSS[:, None], scale=scale).transpose(1, 2)


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
    most_scores: int = MOST_SCORES,
) -> Tensor:
    """`tail_attention_plain`, at most `most_scores` scores at a time: more places are walked in pieces, whose scores
    the backward makes again."""
    B, A, H = q_BAHd.shape[:3]
    size = max(1, most_scores // (B * H * (context_k_BSGd.shape[1] + tail_k_BACGd.shape[2])))
    run = partial(tail_attention_plain, window=window)
    if size >= A:
        return run(q_BAHd, context_k_BSGd, context_v_BSGd, tail_k_BACGd, tail_v_BACGd, last_BA, start_BA, scale)
    pieces = []
    for some in (slice(start, start + size) for start in range(0, A, size)):
        tail = (tail_k_BACGd[:, some], tail_v_BACGd[:, some], last_BA[:, some], start_BA[:, some])
        inputs = (q_BAHd[:, some], context_k_BSGd, context_v_BSGd, *tail, scale)
        pieces.append(checkpoint(run, *inputs, use_reentrant=False))
    return torch.cat(pieces, dim=1)


def tail_attention_plain(
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
