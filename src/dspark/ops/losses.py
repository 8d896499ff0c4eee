"""Losses of one draft slot, on logits; reductions over slots are the caller's.

... leading dimensions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


class SlotLosses(NamedTuple):
    """All [...], float32. `acceptance` = Σ min(p, q) carries no gradient: it is a label and a measurement."""

    cross_entropy: Tensor
    l1: Tensor
    acceptance: Tensor


def slot_losses(draft_V: Tensor, target_V: Tensor, label: Tensor) -> SlotLosses:
    """Cross-entropy with the true token, and ‖p_d − p_t‖₁ of the two softmaxes (DSpark, §3.3).

    Σ min(p_d, p_t) = 1 − ½‖p_d − p_t‖₁ is the chance that a token drawn from p_d is accepted.
    """
    log_draft_V = draft_V.float().log_softmax(-1)
    cross_entropy = -log_draft_V.gather(-1, label[..., None])[..., 0]
    l1 = (log_draft_V.exp() - target_V.float().softmax(-1)).abs().sum(-1)
    return SlotLosses(cross_entropy, l1, 1 - l1.detach() / 2)


def confidence_loss(logit: Tensor, acceptance: Tensor) -> Tensor:
    """Binary cross-entropy of σ(logit) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (DSpark, eq. 8)."""
    return binary_cross_entropy_with_logits(logit.float(), acceptance, reduction="none")


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Σ w·x / Σ w, and 0 where nothing has weight."""
    return (value * weight).sum() / weight.sum().clamp(min=1e-8)
