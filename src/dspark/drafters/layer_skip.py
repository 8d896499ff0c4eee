"""Self-speculation: the target's own first layers and a trained exit norm draft for the whole of it (arXiv 2309.08168).

B rows of S tokens with A anchors and K slots each, N places, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.drafters.body import softcapped
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.layers import BackboneConfig, RMSNorm
from dspark.drafters.lesson import Blocks, Lesson, following, rows_at
from dspark.models.batch import Ragged
from dspark.models.pages import KVPool
from dspark.models.target import Target
from dspark.models.truncated import truncated


class ExitHead(nn.Module):
    """What is trained and saved: the norm between the exit layer, which is the tap, and the target's LM head."""

    every_position, draft_ids = False, None

    def __init__(self, config: BackboneConfig, lm_head: nn.Module, *, taps: tuple[int, ...], block_size: int) -> None:
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = block_size
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = lm_head.requires_grad_(False)

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def forward(self, lesson: Lesson) -> Blocks:
        """Slot k is read at anchor + k: the true tokens before it have gone through the layers."""
        shape_BAK = (*lesson.anchor_BA.shape, self.block_size)
        order_BS = torch.arange(lesson.token_BS.shape[1], device=lesson.token_BS.device).expand_as(lesson.token_BS)
        place_BN = following(order_BS, lesson.anchor_BA, self.block_size).flatten(1)
        exit_BND = rows_at(lesson.taps_BSD.to(self.norm.weight.dtype), place_BN)
        return Blocks(self.norm(exit_BND).view(*shape_BAK, -1), None, None)

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        return softcapped(self.lm_head(hidden_ND), self.config.logit_softcap)


class LayerSkip(DraftModel):
    """A draft model made of the target's first layers.

    Its keys and values of committed tokens are the target's own: `share` reads them from the target's pages, and
    drafted tokens write theirs past the committed text, where the target's next forward overwrites them before
    anything reads them. On pages of its own (`allocate`) it recomputes what is committed, as any draft model.
    """

    def __init__(self, target: Target, head: ExitHead) -> None:
        (exit_layer,) = head.taps
        self.depth = exit_layer + 1
        model = Target(truncated(target.model, self.depth, head.norm))
        super().__init__(model, target.vocab_size, block_size=head.block_size)
        self.shared = False

    def share(self, pool: KVPool) -> None:
        """Use the target's pages of the first layers."""
        self.pool = KVPool(pool.keys[: self.depth], pool.values[: self.depth], pool.pages, pool.page_size)
        self.shared = True

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Nothing to do on shared pages: the target's forward has written them."""
        if not self.shared:
            super().extend(batch, taps_TD)
