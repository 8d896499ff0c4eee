"""The three losses of a block drafter, weighted over its slots.

B sequences, A anchors, K block slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.drafters.body import BlockLogits
from dspark.ops.losses import confidence_loss, slot_losses, weighted_mean


@dataclass(frozen=True)
class Weights:
    """Slot k (from 0) weighs exp(−k / decay). DeepSpec's settings; DFlash trains with cross-entropy 1 alone."""

    decay: float = 4.0
    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0


@dataclass(frozen=True)
class Objective:
    """`total` carries the gradient; the rest is for the log, and stays on the device until it is read."""

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    confidence: Tensor
    acceptance_BAK: Tensor  # Σ_v min(p, q)
    mask_BAK: Tensor


def objective(
    blocks: BlockLogits, target_BAKV: Tensor, label_BAK: Tensor, mask_BAK: Tensor, weights: Weights
) -> Objective:
    """Loss = ce·CE + l1·‖p_d − p_t‖₁ + confidence·BCE, each a mean weighted over counted slots (DSpark, §3.3)."""
    slots = torch.arange(mask_BAK.shape[-1], device=mask_BAK.device)
    weight_BAK = mask_BAK * torch.exp(-slots / weights.decay)
    losses = slot_losses(blocks.draft, target_BAKV, label_BAK)
    cross_entropy = weighted_mean(losses.cross_entropy, weight_BAK)
    l1 = weighted_mean(losses.l1, weight_BAK)
    confidence = cross_entropy.new_zeros(())
    if blocks.confidence is not None:
        confidence = weighted_mean(confidence_loss(blocks.confidence, losses.acceptance), weight_BAK)
    return Objective(
        total=weights.cross_entropy * cross_entropy + weights.l1 * l1 + weights.confidence * confidence,
        cross_entropy=cross_entropy.detach(),
        l1=l1.detach(),
        confidence=confidence.detach(),
        acceptance_BAK=losses.acceptance,
        mask_BAK=mask_BAK,
    )
