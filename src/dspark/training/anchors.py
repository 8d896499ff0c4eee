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
    """Up to `count` random eligible positions of every document, in order.

    Returns (anchor_BA int64, keep_BA bool): rows with fewer repeat their last one with keep false. A piece's anchors
    are a function of (seed, piece): the same on every device, whatever shares its row or its batch.
    """
    eligible_BS, start_BS = eligible(batch).cpu(), batch.start_BS.cpu()
    order_BS = torch.arange(start_BS.shape[1]).expand_as(start_BS)
    piece_BS = torch.full_like(start_BS, -1)
    for piece, row, begin, end in batch.spans:
        piece_BS[row, begin:end] = piece
    seed_BS = hash64(torch.full_like(piece_BS, seed), piece_BS, ANCHORS)
    lot_BS = uniform(seed_BS, order_BS - start_BS, ANCHORS).masked_fill(~eligible_BS, -1.0)
    # Documents follow one another, so that sorting within each leaves it in its place, and ranks count from its start.
    sorted_BS = (2.0 * start_BS - lot_BS).argsort(dim=1)
    drawn_BS = torch.zeros_like(eligible_BS).scatter(1, sorted_BS, order_BS - start_BS < count) & eligible_BS
    most = max(1, int(drawn_BS.sum(1).max()))
    anchor_BA = torch.where(drawn_BS, order_BS, start_BS.shape[1]).sort(dim=1).values[:, :most]
    keep_BA = anchor_BA < start_BS.shape[1]
    last_B1 = anchor_BA.masked_fill(~keep_BA, 0).amax(1, keepdim=True)
    device = batch.token_BS.device
    return torch.where(keep_BA, anchor_BA, last_B1).to(device), keep_BA.to(device)


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
