"""A standalone draft model while it is trained: any Hugging Face causal LM over the target's vocabulary.

B rows of S tokens with A anchors and K slots each, N places, V vocabulary, D the student's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark.drafters.body import softcapped
from dspark.drafters.lesson import Blocks, Lesson, following, rows_at
from dspark.models.taps import decoder_of


class Student(nn.Module):
    """Learns what the target says on the target's own text (DistillSpec, arXiv 2310.08461); it needs no taps."""

    taps: tuple[int, ...] = ()
    every_position, draft_ids = False, None

    def __init__(self, model: PreTrainedModel, *, block_size: int) -> None:
        super().__init__()
        self.model = model
        self.block_size = block_size
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def forward(self, lesson: Lesson) -> Blocks:
        """Slot k is read at anchor + k. Positions that restart keep the documents of a row apart."""
        order_BS = torch.arange(lesson.token_BS.shape[1], device=lesson.token_BS.device).expand_as(lesson.token_BS)
        decoder, where = decoder_of(self.model), lesson.position_BS
        last_BSD = decoder(input_ids=lesson.token_BS, position_ids=where, use_cache=False).last_hidden_state
        place_BN = following(order_BS, lesson.anchor_BA, self.block_size).flatten(1)
        return Blocks(rows_at(last_BSD, place_BN).unflatten(1, (-1, self.block_size)), None, None)

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        return softcapped(self.model.get_output_embeddings()(hidden_ND), self.softcap)
