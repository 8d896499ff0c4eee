"""Losses of draft slots on their logits: the specification of `chunked_loss`, and the reductions over slots.

... leading dimensions, V draft vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


class SlotLosses(NamedTuple):
    """All [...], float32. `acceptance` = Σ min(p, q) and `taken` carry no gradient: they are labels and measurements.

    `taken` = min(1, q(x) / p(x)) for the true token x: given that x was committed, how often it was the draft's.
    """

    cross_entropy: Tensor
    l1: Tensor
    kl: Tensor
    acceptance: Tensor
    taken: Tensor


def slot_losses(draft_V: Tensor, target_V: Tensor, label: Tensor, draft_ids_V: Tensor | None = None) -> SlotLosses:
    """The specification: −log p_d(label), ‖p_d − p_t‖₁ and KL(p_t‖p_d) of the two softmaxes (DSpark, §3.3).

    Σ min(p_d, p_t) = 1 − ½‖p_d − p_t‖₁ is the chance that a token drawn from p_d is accepted. KL is the soft
    cross-entropy to the target less the target's entropy, which no gradient sees. With a pruned vocabulary
    (`draft_ids_V` names the target's logit of each draft token) the l1 counts what the target puts elsewhere, and the
    KL is to the target restricted to the draft's tokens. A label is an index in the draft's vocabulary; −1, a token
    it lacks, has cross-entropy 0.
    """
    log_draft_V, target_V = widen(draft_V).log_softmax(-1), widen(target_V)
    cross_entropy = -log_draft_V.gather(-1, label.clamp(min=0)[..., None])[..., 0] * (label >= 0)
    log_target_V, mass = target_V.log_softmax(-1), None
    if draft_ids_V is not None:
        kept_V = log_target_V[..., draft_ids_V]
        mass = kept_V.exp().sum(-1)
        log_target_V = kept_V.log_softmax(-1)
    share_V = log_target_V.exp() if mass is None else log_target_V.exp() * mass[..., None]
    l1 = (log_draft_V.exp() - share_V).abs().sum(-1)
    if mass is not None:
        l1 = l1 + (1 - mass)
    kl = (log_target_V.exp() * (log_target_V - log_draft_V)).sum(-1)
    share = share_V.gather(-1, label.clamp(min=0)[..., None])[..., 0]
    taken = (log_draft_V.detach().gather(-1, label.clamp(min=0)[..., None])[..., 0].exp() / share).clamp(max=1)
    return SlotLosses(cross_entropy, l1, kl, 1 - l1.detach() / 2, taken * (label >= 0))


def widen(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def confidence_loss(logit: Tensor, acceptance: Tensor) -> Tensor:
    """Binary cross-entropy of σ(logit) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (DSpark, eq. 8)."""
    return binary_cross_entropy_with_logits(widen(logit), acceptance, reduction="none")


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Σ w·x / Σ w, and 0 where nothing has weight."""
    return (value * weight).sum() / weight.sum().clamp(min=1e-8)
