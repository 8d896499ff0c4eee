"""What DSpark and DFlash share: the backbone between the target's frozen embedding and LM head, and its paged context.

R requests, K block slots, B sequences, S tokens, A anchors, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dspark.drafters.backbone import Backbone, Pools
from dspark.drafters.base import DraftContext
from dspark.models.batch import Ragged
from dspark.ops.attention import store


class BlockLogits(NamedTuple):
    """What training needs of every block: draft logits [B, A, K, V] and confidence logits [B, A, K] or None."""

    draft: Tensor
    confidence: Tensor | None


class Body(nn.Module):
    """Backbone, embedding, LM head. `embed_tokens` and `lm_head` hold the target's own tensors, frozen.

    `sample_from_anchor` true: K inputs, slot k drafts anchor+k+1. False: anchor and K masks, the mask slots are read
    (classic DFlash: input k drafts anchor+k). Mixing them up gives τ ≈ 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        embed_tokens: nn.Embedding,
        lm_head: nn.Module,
        *,
        mask_token_id: int,
        sample_from_anchor: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed_tokens = embed_tokens.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(False)
        self.mask_token_id = mask_token_id
        self.skip = 0 if sample_from_anchor else 1
        self.page_size = 0
        self.pools: Pools = ()

    def allocate(self, pages: int, page_size: int) -> None:
        """Make the context pools, addressed by the target's page table."""
        self.page_size = page_size
        self.pools = self.backbone.allocate(pages * page_size)

    @torch.inference_mode()
    def extend(self, batch: Ragged, taps_TD: Tensor) -> None:
        """Project the taps of committed tokens to every layer's keys and values and store them."""
        projected = self.backbone.project(taps_TD, batch.position_T)
        for (key, value), (pool_key, pool_value) in zip(projected, self.pools, strict=True):
            store(key, value, pool_key, pool_value, batch.slot_T)

    def inputs(self, anchor: Tensor, slots: int) -> Tensor:
        """Embeddings [..., slots (+1), D]: the anchor's, then the mask token's."""
        ids = anchor.new_full((*anchor.shape, slots + self.skip), self.mask_token_id)
        ids[..., 0] = anchor
        return self.embed_tokens(ids)

    def hidden(self, context: DraftContext) -> Tensor:
        """Final hidden states [R, K, D] of one block a request."""
        requests, width = len(context.anchor_R), context.slots + self.skip
        offset = torch.arange(width, device=context.anchor_R.device)
        cu_query_R1 = torch.arange(requests + 1, dtype=torch.int32, device=offset.device) * width
        hidden_TD = self.backbone(
            self.inputs(context.anchor_R, context.slots).flatten(0, 1),
            (context.position_R[:, None] + offset).flatten(),
            self.pools,
            context.page_table_RP,
            cu_query_R1,
            context.position_R.to(torch.int32),
            self.page_size,
        )
        return hidden_TD.unflatten(0, (requests, width))[:, self.skip :]

    def blocks(self, token_BS: Tensor, taps_BSD: Tensor, anchor_BA: Tensor, slots: int) -> Tensor:
        """Final hidden states [B, A, K, D] of many blocks a sequence, for training."""
        inputs_BAKD = self.inputs(token_BS.gather(1, anchor_BA), slots)
        return self.backbone.blocks(inputs_BAKD, anchor_BA, taps_BSD)[:, :, self.skip :]


def following(token_BS: Tensor, anchor_BA: Tensor, slots: int, shift: int = 0) -> Tensor:
    """[B, A, K] values of token_BS at anchor + shift + k; past the end the last one, which no label reads."""
    offset = torch.arange(slots, device=token_BS.device) + shift
    index = (anchor_BA[..., None] + offset).clamp(max=token_BS.shape[1] - 1)
    return token_BS.gather(1, index.flatten(1)).view(index.shape)


def certainty(logits: Tensor) -> Tensor:
    """max_v softmax(logits): a drafter's confidence when it has no head for it."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
