"""What DSpark and DFlash share: the backbone between the target's frozen embedding and LM head, and its paged context.

R requests, K block slots, B sequences, S tokens, A anchors, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.drafters.backbone import Backbone, Pools
from dspark.drafters.base import DraftContext
from dspark.drafters.lesson import Lesson
from dspark.drafters.native import native_block, native_context
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.ops.attention import store

MOST_SLOTS = 1024  # of one block, more than any drafter has


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
        self.offsets = torch.arange(MOST_SLOTS, device=self.pools[0][0].device)
        identity = f"{self.backbone.config} {self.pools[0][0].dtype} {page_size} {self.embed_tokens.weight.shape}"
        self._block = SwappableGraph(
            BlockForward(self, page_size), f"block {identity} {self.mask_token_id}", lambda: native_block(self)
        )
        self._context = SwappableGraph(
            ContextForward(self.backbone), f"context {identity}", lambda: native_context(self)
        )

    def compile_forwards(self) -> tuple[SwappableGraph, SwappableGraph]:
        """Compile both forwards or load them from the cache; they run eagerly until that is done."""
        pools = [x.new_zeros(8 * self.page_size, *x.shape[1:]) for x in flat(self.pools)]
        config, order_T = self.backbone.config, torch.arange(6)
        table_RP, anchor_R, position_R = (
            torch.tensor([[1, 2], [3, 4]]).int(),
            torch.tensor([5, 7]),
            torch.tensor([2, 3]),
        )
        self._block.prepare((anchor_R, position_R, table_RP, order_T[:4], *pools))
        taps_TD = torch.randn(6, config.tap_count * config.hidden_size).to(pools[0].dtype)
        self._context.prepare((taps_TD, order_T + 9, order_T, *pools))  # positions that are not the slots
        return self._block, self._context

    def extend(self, batch: Ragged, taps_TD: Tensor) -> None:
        """Project the taps of a forward's rows to every layer's keys and values and store them."""
        self.extend_rows(taps_TD, batch.position_T, batch.slot_T)

    @torch.inference_mode()
    def extend_rows(self, taps_TD: Tensor, position_T: Tensor, slot_T: Tensor) -> None:
        """The same, of rows by their positions and slots."""
        self._context(taps_TD, position_T, slot_T, *flat(self.pools))

    def ids(self, anchor: Tensor, slots: int) -> Tensor:
        """Input tokens [..., slots (+1)]: the anchor, then the mask token."""
        ids = anchor.new_full((*anchor.shape, slots + self.skip), self.mask_token_id)
        ids[..., 0] = anchor
        return ids

    def draft(self, context: DraftContext) -> tuple[Tensor, Tensor]:
        """Final hidden states [R, K, D] and base logits [R, K, V] of one block a request."""
        offset_K = self.offsets[: context.slots + self.skip]
        inputs = (context.anchor_R, context.position_R, context.page_table_RP, offset_K)
        hidden_RKD, base_RKV = self._block(*inputs, *flat(self.pools))
        if self.skip:
            return hidden_RKD[:, self.skip :], base_RKV[:, self.skip :]
        return hidden_RKD, base_RKV

    def logits(self, hidden: Tensor) -> Tensor:
        """Base logits [..., V] of final hidden states [..., D]."""
        return softcapped(self.lm_head(hidden), self.backbone.config.logit_softcap)

    def blocks(self, lesson: Lesson, slots: int) -> Tensor:
        """Final hidden states [B, A, K, D] of many blocks a row, for training."""
        inputs_BAKD = self.embed_tokens(self.ids(lesson.token_BS.gather(1, lesson.anchor_BA), slots))
        inputs_BAKD = inputs_BAKD * self.backbone.config.embedding_scale
        return self.backbone.blocks(inputs_BAKD, lesson)[:, :, self.skip :]


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(x / cap) where the family does that to its logits; 0 for no cap."""
    return cap * torch.tanh(logits / cap) if cap else logits


def flat(pools: Pools) -> list[Tensor]:
    """Keys and values of every layer, one after the other."""
    return [pool for pair in pools for pool in pair]


class BlockForward(nn.Module):
    """(anchors, their positions, page table, 0..K-1, pools…) → hidden states and base logits of every input."""

    def __init__(self, body: Body, page_size: int) -> None:
        super().__init__()
        self.embed_tokens, self.backbone, self.lm_head = body.embed_tokens, body.backbone, body.lm_head
        self.page_size, self.mask_token_id = page_size, body.mask_token_id

    def forward(
        self, anchor_R: Tensor, position_R: Tensor, page_table_RP: Tensor, offset_K: Tensor, *pools: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([R, K, D], [R, K, V])."""
        config, requests, width = self.backbone.config, anchor_R.shape[0], offset_K.shape[0]
        ids_RK = torch.where(offset_K == 0, anchor_R[:, None], self.mask_token_id)
        cu_query_R1 = torch.arange(requests + 1, dtype=torch.int32, device=anchor_R.device) * width
        hidden_TD = self.backbone(
            self.embed_tokens(ids_RK.flatten()) * config.embedding_scale,
            (position_R[:, None] + offset_K).flatten(),
            tuple(zip(pools[::2], pools[1::2], strict=True)),
            page_table_RP,
            cu_query_R1,
            position_R.to(torch.int32),
            self.page_size,
        )
        base_TV = softcapped(self.lm_head(hidden_TD), config.logit_softcap)
        return hidden_TD.view(requests, width, -1), base_TV.view(requests, width, -1)


class ContextForward(nn.Module):
    """(taps, positions, slots, pools…): projects a forward's rows and stores their keys and values."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, taps_TD: Tensor, position_T: Tensor, slot_T: Tensor, *pools: Tensor) -> tuple[Tensor]:
        """The slots after the last, so that the graph has a result."""
        projected = self.backbone.project(taps_TD, position_T)
        for (key, value), pool_key, pool_value in zip(projected, pools[::2], pools[1::2], strict=True):
            store(key, value, pool_key, pool_value, slot_T)
        return (slot_T + 1,)
