"""Which positions of a row are drafted from in training, and which of their slots have a label.

B rows of packed documents, S tokens, A anchors, K block slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.common.rng import ANCHORS, hash64, uniform
from dspark.drafters.lesson import following
from dspark.training.data import Batch


def eligible(batch: Batch) -> Tensor:
    """Positions [B, S] whose own and next token are supervised, both of one document (DSpark, §3.3)."""
    mask_BS = batch.mask_BS.clone()
    mask_BS[:, :-1] &= batch.mask_BS[:, 1:] & (batch.start_BS[:, 1:] == batch.start_BS[:, :-1])
    mask_BS[:, -1] = False
    return mask_BS


def every_anchor(batch: Batch) -> tuple[Tensor, Tensor]:
    """(anchor_BA, keep_BA) with an anchor at every position, kept where it is eligible."""
    keep_BS = eligible(batch)
    return torch.arange(keep_BS.shape[1], device=keep_BS.device).expand(keep_BS.shape), keep_BS


def sample_anchors(batch: Batch, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to `count` random eligible positions a row, in order.

    Returns (anchor_BA int64, keep_BA bool): where a row has fewer, the rest repeat an eligible place with keep false.
    A row's anchors are a function of (seed, its first piece): the same on every device, beside any other rows.
    """
    eligible_BS = eligible(batch).cpu()
    count = max(1, min(count, int(eligible_BS.sum(1).max())))  # no more than the richest row has
    first_B1 = torch.tensor([[row[0]] for row in batch.pieces])
    row_seed_B1 = hash64(torch.full_like(first_B1, seed), first_B1, ANCHORS)
    lot_BS = uniform(row_seed_B1, torch.arange(eligible_BS.shape[1]), ANCHORS).masked_fill(~eligible_BS, -1.0)
    lot_BA, anchor_BA = lot_BS.topk(count, dim=1)
    keep_BA = lot_BA >= 0
    anchor_BA = torch.where(keep_BA, anchor_BA, anchor_BA[:, :1])
    order_BA = torch.where(keep_BA, anchor_BA, eligible_BS.shape[1]).argsort(dim=1, stable=True)
    device = batch.token_BS.device
    return anchor_BA.gather(1, order_BA).to(device), keep_BA.gather(1, order_BA).to(device)


def labels(batch: Batch, anchor_BA: Tensor, keep_BA: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(token_BAK that slot k must draft, mask_BAK of slots that count).

    Nothing counts after the first unsupervised token, or past the document's end.
    """
    offset_K = torch.arange(1, slots + 1, device=anchor_BA.device)
    inside_BAK = anchor_BA[..., None] + offset_K < batch.token_BS.shape[1]
    inside_BAK &= following(batch.start_BS, anchor_BA, slots, shift=1) == batch.start_BS.gather(1, anchor_BA)[..., None]
    supervised_BAK = following(batch.mask_BS, anchor_BA, slots, shift=1) & inside_BAK
    mask_BAK = supervised_BAK.long().cumprod(-1).bool() & keep_BA[..., None]
    return following(batch.token_BS, anchor_BA, slots, shift=1), mask_BAK
