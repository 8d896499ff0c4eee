"""From a batch to its objective: anchors, the target's features, the drafter, the losses.

B rows, S tokens, A anchors, K block slots, D hidden size, k taps.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from dspark.drafters.lesson import Lesson, Trainable, following
from dspark.training.anchors import every_anchor, labels, sample_anchors
from dspark.training.data import Batch
from dspark.training.objectives import Objective, Teacher, Weights, objective


class Features(Protocol):
    """What a frozen target says about a batch, from wherever it comes."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(taps [B, S, k·D], last hidden state after the final norm [B, S, D])."""
        ...

    def logits(self, last_ND: Tensor) -> Tensor:
        """The target's logits [N, V] of last hidden states."""
        ...


def goal(
    drafter: Trainable,
    features: Features,
    batch: Batch,
    *,
    weights: Weights,
    anchors: int | None,
    seed: int = 0,
    precision: str = "float32",
) -> Objective:
    """The objective of one batch on the drafter's device, from up to `anchors` places a row; None for all there are."""
    slots = drafter.lesson_slots
    everywhere = drafter.every_position or anchors is None
    anchor_BA, keep_BA = every_anchor(batch) if everywhere else sample_anchors(batch, anchors or 0, seed)
    label_BAK, mask_BAK = labels(batch, anchor_BA, keep_BA, slots)
    order_BS = torch.arange(batch.token_BS.numel(), device=batch.token_BS.device).view_as(batch.token_BS)
    half = precision == "bfloat16"
    with torch.autocast(batch.token_BS.device.type, torch.bfloat16) if half else nullcontext():
        taps_BSD, last_BSD = features(batch)
        blocks = drafter(Lesson(batch.token_BS, taps_BSD, batch.start_BS, anchor_BA))
        # slot k drafts the token at anchor + k + 1, which the target predicts at anchor + k (DSpark, §3.3)
        teacher = Teacher(last_BSD.flatten(0, 1), features.logits, following(order_BS, anchor_BA, slots))
        return objective(drafter, blocks, teacher, label_BAK, mask_BAK, weights)
