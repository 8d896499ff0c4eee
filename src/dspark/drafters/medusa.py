"""Medusa heads (arXiv 2401.10774): head k guesses k + 1 places ahead, from the target's last hidden state alone.

R requests, T ragged tokens, K heads = block slots, S pool slots, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.body import softcapped
from dspark.drafters.drawing import Drawing
from dspark.drafters.layers import BackboneConfig, RMSNorm
from dspark.drafters.lesson import Blocks, Lesson, rows_at
from dspark.drafters.signal import LARGEST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.pages import slots_at


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class Medusa(nn.Module):
    """K heads of residual blocks before the target's LM head, or before one of their own each.

    The tap is the target's last layer; `norm` stands in for the target's last norm. The anchor was drawn from the
    hidden state before it, so that is the newest there is: slot k reads position anchor − 1.
    """

    every_position, draft_ids = False, None
    signal: Signal = LARGEST
    feature_SD: Tensor
    page_size: int

    def __init__(
        self,
        config: BackboneConfig,
        lm_head: nn.Module,
        *,
        taps: tuple[int, ...],
        block_size: int,
        layers: int = 1,
        own_heads: int = 0,
    ) -> None:
        """`own_heads` > 0 gives every head an LM head of its own over so many tokens; `lm_head` is then unused."""
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = block_size
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.medusa_head = nn.ModuleList(head(config.hidden_size, layers, own_heads) for _ in range(block_size))
        self.lm_head = None if own_heads else lm_head.requires_grad_(False)
        self.depth = layers

    def hidden(self, feature_D: Tensor, slot: int) -> Tensor:
        """What the LM head of a slot reads, [..., D], from the normed hidden state [..., D]."""
        for block in self.medusa_head[slot][: self.depth]:  # type: ignore[index]
            feature_D = block(feature_D)
        return feature_D

    def logits(self, hidden_D: Tensor, slot: int) -> Tensor:
        """Logits [..., V] of a slot."""
        lm_head = self.medusa_head[slot][-1] if self.lm_head is None else self.lm_head  # type: ignore[index]
        return softcapped(lm_head(hidden_D), self.config.logit_softcap)

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def forward(self, lesson: Lesson) -> Blocks:
        """Every head on the hidden state before each anchor. Heads that are their own need to know their slot."""
        feature_BAD = self.norm(rows_at(lesson.taps_BSD.to(self.norm.weight.dtype), lesson.before_BA))
        hidden_BAKD = torch.stack([self.hidden(feature_BAD, slot) for slot in range(self.block_size)], dim=2)
        hidden_BAKD = hidden_BAKD * lesson.begun_BA1[..., None]
        slot_K1 = torch.arange(self.block_size, device=hidden_BAKD.device, dtype=hidden_BAKD.dtype)[:, None]
        latent_BAK1 = None if self.lm_head is not None else slot_K1.expand(*hidden_BAKD.shape[:3], 1)
        return Blocks(hidden_BAKD, latent_BAK1, None)

    def slot_logits(self, hidden_ND: Tensor, latent_N1: Tensor | None) -> Tensor:
        if latent_N1 is None:
            return self.logits(hidden_ND, 0)
        slots = range(self.block_size)
        found = [torch.nonzero(latent_N1[:, 0] == slot)[:, 0] for slot in slots]
        each = [self.logits(hidden_ND[rows], slot) for rows, slot in zip(found, slots, strict=True)]
        return torch.cat(each)[torch.cat(found).argsort()]

    def allocate(self, pages: int, page_size: int) -> None:
        """A pool of normed hidden states, addressed by the target's page table."""
        self.page_size = page_size
        self.feature_SD = self.norm.weight.new_zeros(pages * page_size, self.config.hidden_size)

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Nothing is compiled yet."""
        return ()

    @torch.inference_mode()
    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        assert taps_TD is not None, "Medusa reads the target's last hidden state"
        self.feature_SD[batch.slot_T] = self.norm(taps_TD.to(self.feature_SD.dtype))

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        position_R1 = (context.position_R - 1).clamp(min=0)[:, None]
        feature_RD = self.feature_SD[slots_at(context.page_table_RP, position_R1, self.page_size)[:, 0]]
        drawing = Drawing(context, self.signal)
        for slot in range(context.slots):
            drawing.draw(self.logits(self.hidden(feature_RD, slot), slot))
            if drawing.ended:
                break
        return drawing.draft()


def head(width: int, layers: int, own_vocabulary: int) -> nn.Sequential:
    """Residual blocks, then an LM head where the vocabulary is not 0."""
    parts: list[nn.Module] = [ResidualBlock(width) for _ in range(layers)]
    if own_vocabulary:
        parts.append(nn.Linear(width, own_vocabulary, bias=False))
    return nn.Sequential(*parts)
