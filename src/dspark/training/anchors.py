"""Which positions of a sequence are drafted from in training, and which of their slots have a label.

B sequences, S tokens, A anchors, K block slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.drafters.body import following


def sample_anchors(loss_mask_BS: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to `count` random positions a sequence, in order, whose own and next token are both supervised (DSpark, §3.3).

    Returns (anchor_BA int64, keep_BA bool): where a sequence has fewer, the rest repeat an eligible place with keep
    false. `generator` lives on the CPU, so that a run draws the same anchors on every device.
    """
    mask_BS = loss_mask_BS.bool().cpu()
    eligible_BS = mask_BS.clone()
    eligible_BS[:, :-1] &= mask_BS[:, 1:]
    eligible_BS[:, -1] = False
    count = min(count, mask_BS.shape[1])
    lot_BS = torch.rand(mask_BS.shape, generator=generator).masked_fill(~eligible_BS, -1.0)
    lot_BA, anchor_BA = lot_BS.topk(count, dim=1)
    keep_BA = lot_BA >= 0
    anchor_BA = torch.where(keep_BA, anchor_BA, anchor_BA[:, :1])
    order_BA = torch.where(keep_BA, anchor_BA, mask_BS.shape[1]).argsort(dim=1, stable=True)
    device = loss_mask_BS.device
    return anchor_BA.gather(1, order_BA).to(device), keep_BA.gather(1, order_BA).to(device)


def labels(
    token_BS: Tensor, loss_mask_BS: Tensor, anchor_BA: Tensor, keep_BA: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    """(token_BAK that slot k must draft, mask_BAK of slots that count): nothing counts after the first unsupervised."""
    offset_K = torch.arange(1, slots + 1, device=token_BS.device)
    inside_BAK = anchor_BA[..., None] + offset_K < token_BS.shape[1]
    supervised_BAK = following(loss_mask_BS.long(), anchor_BA, slots, shift=1).bool() & inside_BAK
    mask_BAK = supervised_BAK.long().cumprod(-1).bool() & keep_BA[..., None]
    return following(token_BS, anchor_BA, slots, shift=1), mask_BAK
