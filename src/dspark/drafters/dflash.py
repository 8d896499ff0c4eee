"""DFlash: the parallel backbone alone; every slot's distribution ignores the tokens drawn before it.

R requests, K block slots, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.body import Body
from dspark.drafters.drawing import drafted
from dspark.drafters.lesson import Blocks, Lesson
from dspark.drafters.signal import LARGEST, Signal, features
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph


class DFlash(nn.Module):
    """Drafts a block in one pass (arXiv 2602.06036). Both slot layouts: see `Body.sample_from_anchor`."""

    every_position, draft_ids = False, None

    rows_apart = True
    signal: Signal = LARGEST

    def __init__(self, body: Body, *, taps: tuple[int, ...], block_size: int) -> None:
        super().__init__()
        self.body = body
        self.taps = taps
        self.block_size = block_size

    def allocate(self, pages: int, page_size: int) -> None:
        self.body.allocate(pages, page_size)

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        return self.body.compile_forwards()

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        assert taps_TD is not None, "DFlash reads the target's hidden states"
        self.body.extend(batch, taps_TD)

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        """Confidences come from the untempered base logits: they know nothing of the draw."""
        _, base_RKV = self.body.draft(context)
        drawn = [context.sampler.draw(base_RKV[:, slot], slot) for slot in range(context.slots)]
        token_RK = torch.stack([token_R for token_R, _ in drawn], dim=1)
        law_RKV = torch.stack([law_RV for _, law_RV in drawn], dim=1)
        return drafted(token_RK, law_RKV, features(base_RKV) if context.wanted else None, self.signal)

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def forward(self, lesson: Lesson) -> Blocks:
        """Every block of every row, for training."""
        return Blocks(self.body.blocks(lesson, self.block_size), None, None)

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        return self.body.logits(hidden_ND)
