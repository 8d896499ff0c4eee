"""Attention of ragged queries over paged keys and values: plain torch, the specification of every kernel.

T query tokens, R sequences, H query heads, G key/value heads, d head size, S slots of the pool, P pages a sequence.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dspark.ops.cpu import DTYPES, has_kernel

KERNEL_DTYPES = (*DTYPES, torch.float16)


def store_plain(k_TGd: Tensor, v_TGd: Tensor, pool_k_SGd: Tensor, pool_v_SGd: Tensor, slot_T: Tensor) -> None:
    """Put keys and values of T tokens into their pool slots (in place)."""
    pool_k_SGd[slot_T] = k_TGd.to(pool_k_SGd.dtype)
    pool_v_SGd[slot_T] = v_TGd.to(pool_v_SGd.dtype)


def ragged_attention_plain(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    pool_k_SGd: Tensor,
    pool_v_SGd: Tensor,
    page_table_RP: Tensor,
    cu_query_R1: Tensor,
    context_R: Tensor,
    page_size: int,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Each sequence's queries attend to its `context_R` tokens in the pages, then to the call's own keys and values.

    Own keys are seen causally or, for a draft block, all by all. `window` > 0 keeps the last `window` positions
    including a query's own; `softcap` > 0 squashes scores by softcap·tanh(score/softcap). Softmax is in float32 or
    wider. Rows past the last sequence are padding and come out zero. Returns out_THd in the queries' dtype.
    """
    out_THd = q_THd.new_zeros(*q_THd.shape[:2], v_TGd.shape[2])
    bounds, contexts = cu_query_R1.tolist(), context_R.tolist()
    group = q_THd.shape[1] // k_TGd.shape[1]
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    for r, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        context, own = contexts[r], end - start
        token_C = torch.arange(context, device=q_THd.device)
        slot_C = page_table_RP[r, token_C // page_size].long() * page_size + token_C % page_size
        k = torch.cat([pool_k_SGd[slot_C], k_TGd[start:end]]).to(wide).repeat_interleave(group, dim=1)
        v = torch.cat([pool_v_SGd[slot_C], v_TGd[start:end]]).to(wide).repeat_interleave(group, dim=1)
        score = torch.einsum("qhd,khd->hqk", q_THd[start:end].to(wide), k) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        query_pos = torch.arange(context, context + own, device=q_THd.device)[:, None]
        key_pos = torch.arange(context + own, device=q_THd.device)[None, :]
        hidden = torch.zeros(own, context + own, dtype=torch.bool, device=q_THd.device)
        if causal:
            hidden |= key_pos > query_pos
        if window:
            hidden |= key_pos <= query_pos - window
        weight = torch.softmax(score.masked_fill(hidden, float("-inf")), dim=-1)
        out_THd[start:end] = torch.einsum("hqk,khd->qhd", weight, v).to(q_THd.dtype)
    return out_THd


def store(k_TGd: Tensor, v_TGd: Tensor, pool_k_SGd: Tensor, pool_v_SGd: Tensor, slot_T: Tensor) -> None:
    """`store_plain` by the fastest way this device has."""
    if has_kernel(pool_k_SGd, KERNEL_DTYPES) and k_TGd.dtype == pool_k_SGd.dtype:
        torch.ops.dspark.store(k_TGd, v_TGd, pool_k_SGd, pool_v_SGd, slot_T)
    else:
        store_plain(k_TGd, v_TGd, pool_k_SGd, pool_v_SGd, slot_T)


def ragged_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    pool_k_SGd: Tensor,
    pool_v_SGd: Tensor,
    page_table_RP: Tensor,
    cu_query_R1: Tensor,
    context_R: Tensor,
    page_size: int,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`ragged_attention_plain` by the fastest way this device has."""
    run = torch.ops.dspark.ragged_attention if has_kernel(q_THd, KERNEL_DTYPES) else ragged_attention_plain
    return run(
        q_THd,
        k_TGd,
        v_TGd,
        pool_k_SGd,
        pool_v_SGd,
        page_table_RP,
        cu_query_R1,
        context_R,
        page_size,
        scale,
        causal,
        window,
        softcap,
    )
