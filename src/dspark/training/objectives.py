"""What a drafter is trained for: losses of its slots, weighted by how far they are from the anchor.

B rows, S tokens, A anchors, K block slots, N slots that count, P places with a target, V vocabulary, D hidden size,
r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.drafters.lesson import Blocks, Trainable
from dspark.ops.chunked_loss import Rows, Scale, weighted_loss
from dspark.ops.losses import SlotLosses, confidence_loss, weighted_mean


@dataclass(frozen=True)
class Weights:
    """Slot k (from 0) weighs exp(−k / decay), or decay^k. DSpark's settings; DFlash takes cross-entropy 1 alone.

    Eagle-3 takes kl 1 alone and `decay_kind: geometric` with decay 0.8.
    """

    decay: float = 4.0
    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    kl: float = 0.0
    decay_kind: str = "exponential"  # or geometric

    def __post_init__(self) -> None:
        if self.decay_kind not in ("exponential", "geometric"):
            raise UserError(f"loss: decay_kind {self.decay_kind!r} is not known; use exponential or geometric")
        if self.decay <= 0:
            raise UserError(f"loss: decay is {self.decay}; give more than 0")

    def of_slots(self, slots: int, device: torch.device) -> Tensor:
        """The weight of each slot, [K]."""
        slot_K = torch.arange(slots, device=device)
        return self.decay**slot_K if self.decay_kind == "geometric" else torch.exp(-slot_K / self.decay)


@dataclass(frozen=True)
class Objective:
    """`total` carries the gradient; the rest is for the log, and stays on the device until it is read.

    `total` is a mean over this batch's slots; Σ weight·total / Σ weight over several is the mean over all of them.
    """

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    kl: Tensor
    confidence: Tensor
    weight: Tensor  # Σ of the slots' weights
    acceptance_BAK: Tensor  # Σ_v min(p, q), 0 where nothing counts
    taken_BAK: Tensor  # min(1, q(x) / p(x)) of the true tokens, 0 where nothing counts
    mask_BAK: Tensor


@dataclass(frozen=True)
class Teacher:
    """The target's distribution at each place of a batch, as its last hidden states and its head."""

    last_TD: Tensor  # after the final norm, rows one after another
    logits: Callable[[Tensor], Tensor]  # [n, D] → [n, V]
    place_BAK: Tensor  # which row of last_TD says what slot k should draft


def objective(
    drafter: Trainable, blocks: Blocks, teacher: Teacher, label_BAK: Tensor, mask_BAK: Tensor, weights: Weights
) -> Objective:
    """Loss = ce·CE + l1·‖p_d − p_t‖₁ + kl·KL + confidence·BCE, weighted means over counted slots (DSpark, §3.3).

    Logits exist for one chunk of slots at a time.
    """
    weight_BAK = mask_BAK * weights.of_slots(mask_BAK.shape[-1], mask_BAK.device)
    slot_N = mask_BAK.flatten().nonzero()[:, 0]
    slot_N = slot_N[teacher.place_BAK.flatten()[slot_N].argsort(stable=True)]  # places ascending
    weight_N, label_N, hidden_ND = (x.flatten(0, 2)[slot_N] for x in (weight_BAK, label_BAK, blocks.hidden_BAKD))
    total_weight = weight_BAK.sum()
    relative_N = weight_N / total_weight.clamp(min=1e-8)
    rows = rows_of(drafter, teacher, teacher.place_BAK.flatten()[slot_N], label_N, relative_N, weights)
    latent_Nr = None if blocks.latent_BAKr is None else blocks.latent_BAKr.flatten(0, 2)[slot_N]
    trained = [p for p in drafter.parameters() if p.requires_grad]
    total, losses = weighted_loss(rows, hidden_ND, latent_Nr, trained)
    confidence = total.new_zeros(())
    if blocks.confidence_BAK is not None:
        each_N = confidence_loss(blocks.confidence_BAK.flatten()[slot_N], losses.acceptance)
        confidence = weighted_mean(each_N, weight_N)
        total = total + weights.confidence * confidence
    means = SlotLosses(*(weighted_mean(x_N, weight_N) for x_N in losses))
    acceptance_BAK, taken_BAK = (
        torch.zeros_like(weight_BAK).flatten().index_copy(0, slot_N, x_N.to(weight_BAK.dtype)).view_as(weight_BAK)
        for x_N in (losses.acceptance, losses.taken)
    )
    return Objective(
        total=total,
        cross_entropy=means.cross_entropy,
        l1=means.l1,
        kl=means.kl,
        confidence=confidence.detach(),
        weight=total_weight,
        acceptance_BAK=acceptance_BAK,
        taken_BAK=taken_BAK,
        mask_BAK=mask_BAK,
    )


def rows_of(
    drafter: Trainable, teacher: Teacher, last_N: Tensor, label_N: Tensor, weight_N: Tensor, weights: Weights
) -> Rows:
    """Slots sorted by `last_N`, the row of the teacher's hidden states that each is compared with."""
    last_P, place_N = last_N.unique_consecutive(return_inverse=True)
    return Rows(
        draft=drafter.slot_logits,
        target=lambda places: teacher.logits(teacher.last_TD[last_P[places]]),
        place_N=place_N,
        label_N=in_draft_vocabulary(label_N, drafter.draft_ids),
        weight_N=weight_N,
        scale=Scale(weights.cross_entropy, weights.l1, weights.kl),
        draft_ids_V=drafter.draft_ids,
    )


def in_draft_vocabulary(label_N: Tensor, draft_ids_V: Tensor | None) -> Tensor:
    """Labels as indices of the draft's vocabulary, −1 for tokens it lacks."""
    if draft_ids_V is None:
        return label_N
    # as long as any id there is; a label past the last draft id is looked up at the end, which is −1
    size = int(draft_ids_V.max()) + 2
    index_V = torch.full((size,), -1, dtype=label_N.dtype, device=label_N.device)
    index_V[draft_ids_V] = torch.arange(len(draft_ids_V), device=label_N.device)
    return index_V[label_N.clamp(max=size - 1)]
