"""Losses of draft slots: cross-entropy, total variation and KL in one pass over the vocabulary, a chunk at a time.

... leading dimensions, N slots, n slots of a chunk, V draft vocabulary, D hidden size, r rank of a sequential head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

Head = Callable[[Tensor, Tensor | None], Tensor]
CHUNK = 1 << 20  # logits of one chunk: 4 MB in float32, so that a pass over them finds most of them in a cache
FEWEST = 256  # slots of one chunk, whatever the vocabulary: with fewer the heads' weights are read too often

SMALLEST = 1e-30  # a probability that float32 holds


class SlotLosses(NamedTuple):
    """All [...], float32. `acceptance` = Σ min(p, q) and `taken` carry no gradient: they are labels and measurements.

    `taken` = min(1, q(x) / p(x)) for the true token x: given that x was committed, how often it was the draft's.
    """

    cross_entropy: Tensor
    l1: Tensor
    kl: Tensor
    acceptance: Tensor
    taken: Tensor


class Scale(NamedTuple):
    """How much each loss of a slot counts."""

    cross_entropy: float
    l1: float
    kl: float = 0.0


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


def chunk_losses(
    draft_nV: Tensor, target_nV: Tensor, label_n: Tensor, scale: Scale, draft_ids_V: Tensor | None
) -> tuple[SlotLosses, Tensor]:
    """(the losses, their scaled sum's gradient by the draft logits [n, V]), in closed form.

    With q = p_d, p = p_t and s = sign(q − p): d CE = q − 1[label], d l1 = q(s − Σ q s), d KL = q − p.
    """
    draft_nV, target_nV = widen(draft_nV), widen(target_nV)
    log_q_nV = draft_nV.log_softmax(-1)
    known_n = (label_n >= 0).to(log_q_nV.dtype)
    index_n1 = label_n.clamp(min=0)[:, None]
    cross_entropy_n = -log_q_nV.gather(1, index_n1)[:, 0] * known_n
    mass_n1 = None
    if draft_ids_V is not None:
        all_n1 = target_nV.logsumexp(-1, keepdim=True)
        target_nV = target_nV[:, draft_ids_V]
        mass_n1 = (target_nV.logsumexp(-1, keepdim=True) - all_n1).exp()
    kl_n = torch.zeros_like(cross_entropy_n)
    if scale.kl:
        log_p_nV = target_nV.log_softmax(-1)
        p_nV = log_p_nV.exp()
        kl_n = (log_p_nV.sub_(log_q_nV)).mul_(p_nV).sum(-1)
        del log_p_nV
    else:
        p_nV = target_nV.softmax(-1)
    q_nV = log_q_nV.exp_()
    gap_nV = q_nV - (p_nV if mass_n1 is None else p_nV * mass_n1)
    q_n = q_nV.gather(1, index_n1)[:, 0]
    taken_n = known_n * (q_n / (q_n - gap_nV.gather(1, index_n1)[:, 0]).clamp(min=SMALLEST)).clamp(max=1)
    sign_nV = gap_nV.sign()
    l1_n = gap_nV.abs_().sum(-1)
    if mass_n1 is not None:
        l1_n = l1_n + (1 - mass_n1[:, 0])
    inner_n = torch.linalg.vecdot(q_nV, sign_nV)
    constant_n1 = (scale.cross_entropy * known_n + scale.kl - scale.l1 * inner_n)[:, None]
    gradient_nV = sign_nV.mul_(scale.l1).add_(constant_n1).mul_(q_nV)
    if scale.kl:
        gradient_nV.sub_(p_nV, alpha=scale.kl)
    gradient_nV.scatter_add_(1, index_n1, (-scale.cross_entropy * known_n)[:, None])
    return SlotLosses(cross_entropy_n, l1_n, kl_n, 1 - l1_n / 2, taken_n), gradient_nV


@dataclass(frozen=True)
class Rows:
    """Slots whose logits are made chunk by chunk, and what they are compared with."""

    draft: Head  # (hidden [n, D], latent [n, r] or None) → logits [n, V]
    target: Callable[[slice], Tensor]  # logits of a chunk's slots over the target's vocabulary
    label_N: Tensor  # in the draft's vocabulary, −1 for none
    weight_N: Tensor
    scale: Scale
    draft_ids_V: Tensor | None = None
    chunk: int = CHUNK  # logits in one chunk
    fewest: int = FEWEST  # slots in one chunk


class WeightedLoss(torch.autograd.Function):
    """Σ_n weight_n · (scaled losses of slot n). Gradients are made beside the values: nothing [N, V] is kept."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, learn: bool, hidden_ND: Tensor, latent_Nr: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        count, parts = len(hidden_ND), []
        size = max(rows.fewest, rows.chunk // vocabulary_of(rows, hidden_ND, latent_Nr)) if count else 1
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if learn else None
        latent_gradient_Nr = torch.zeros_like(latent_Nr) if learn and latent_Nr is not None else None
        gradients: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, count, size):
            some = slice(start, start + size)
            leaves = [hidden_ND[some].detach().requires_grad_(learn)]
            if latent_Nr is not None:
                leaves.append(latent_Nr[some].detach().requires_grad_(learn))
            with torch.set_grad_enabled(learn):
                draft_nV = rows.draft(leaves[0], leaves[1] if latent_Nr is not None else None)
            with torch.no_grad():
                losses, gradient_nV = chunk_losses(
                    draft_nV.detach(), rows.target(some), rows.label_N[some], rows.scale, rows.draft_ids_V
                )
                gradient_nV.mul_(rows.weight_N[some, None])
            parts.append(losses)
            if learn:
                gradient_nV = gradient_nV.to(draft_nV.dtype)
                found = torch.autograd.grad(draft_nV, [*leaves, *parameters], gradient_nV, allow_unused=True)
                assert hidden_gradient_ND is not None
                hidden_gradient_ND[some] = found[0]
                if latent_gradient_Nr is not None and found[1] is not None:
                    latent_gradient_Nr[some] = found[1]
                for place, gradient in enumerate(found[len(leaves) :]):
                    so_far = gradients[place]
                    gradients[place] = gradient if so_far is None or gradient is None else so_far.add_(gradient)
            del draft_nV, gradient_nV
        values = joined(parts, rows.weight_N)
        per_slot = rows.scale.cross_entropy * values.cross_entropy + rows.scale.l1 * values.l1
        loss = ((per_slot + rows.scale.kl * values.kl) * rows.weight_N).sum()
        ctx.gradients = (hidden_gradient_ND, latent_gradient_Nr, *gradients)
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return loss, *values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None, None, *(None for _ in ctx.gradients))
        return (None, None, *(None if x is None else x * gradient for x in ctx.gradients))


def weighted_loss(
    rows: Rows, hidden_ND: Tensor, latent_Nr: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, SlotLosses]:
    """(Σ_n weight_n · loss_n with its gradient, the losses of every slot without).

    Gradients reach the hidden rows, the latents and those of `parameters` that `rows.draft` reads.
    """
    loss, *values = WeightedLoss.apply(rows, torch.is_grad_enabled(), hidden_ND, latent_Nr, *parameters)
    return loss, SlotLosses(*values)


def vocabulary_of(rows: Rows, hidden_ND: Tensor, latent_Nr: Tensor | None) -> int:
    """How wide the wider of the two logits is, from one slot."""
    one = slice(0, 1)
    with torch.no_grad():
        draft_1V = rows.draft(hidden_ND[one], None if latent_Nr is None else latent_Nr[one])
        return max(draft_1V.shape[-1], rows.target(one).shape[-1])


def joined(parts: list[SlotLosses], like_N: Tensor) -> SlotLosses:
    """The losses of all chunks as one."""
    if not parts:
        return SlotLosses(*(torch.zeros_like(like_N) for _ in SlotLosses._fields))
    return SlotLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def widen(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def confidence_loss(logit: Tensor, acceptance: Tensor) -> Tensor:
    """Binary cross-entropy of σ(logit) with the soft label c* = 1 − ½‖p_d − p_t‖₁ (DSpark, eq. 8)."""
    return binary_cross_entropy_with_logits(widen(logit), acceptance, reduction="none")


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Σ w·x / Σ w, and 0 where nothing has weight."""
    return (value * weight).sum() / weight.sum().clamp(min=1e-8)
