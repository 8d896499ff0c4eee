"""Losses of many slots from their hidden rows, a chunk at a time: nothing of slots × vocabulary outlives its chunk.

N slots, n slots of a chunk, u places of a chunk, V draft vocabulary, D hidden size, r rank of a sequential head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dspark.ops.losses import SlotLosses, widen

Head = Callable[[Tensor, Tensor | None], Tensor]
CHUNK = 1 << 20  # logits of one chunk: 4 MB in float32, so that a pass over them finds most of them in a cache
FEWEST = 256  # slots of one chunk, whatever the vocabulary: with fewer the heads' weights are read too often
SMALLEST = 1e-30  # a probability that float32 holds


class Scale(NamedTuple):
    """How much each loss of a slot counts."""

    cross_entropy: float
    l1: float
    kl: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Slots whose logits are made chunk by chunk, and what they are compared with.

    Slots that draft the same token share a place, whose target logits are made once a chunk: slots come sorted by it.
    """

    draft: Head  # (hidden [n, D], latent [n, r] or None) → logits [n, V]
    target: Callable[[slice], Tensor]  # logits of consecutive places over the target's vocabulary
    place_N: Tensor  # int64, ascending without gaps from 0
    label_N: Tensor  # in the draft's vocabulary, −1 for none
    weight_N: Tensor
    scale: Scale
    draft_ids_V: Tensor | None = None
    chunk: int = CHUNK  # logits in one chunk
    fewest: int = FEWEST  # slots in one chunk

    def chunks(self, vocabulary: int) -> Iterator[tuple[slice, slice]]:
        """(slots, their places) of each chunk; the bounds are read from the device once."""
        count, size = len(self.place_N), max(self.fewest, self.chunk // vocabulary)
        starts = list(range(0, count, size))
        ends = [min(start + size, count) for start in starts]
        place_C2 = self.place_N[torch.tensor([starts, [end - 1 for end in ends]], device=self.place_N.device)]
        for start, end, first, last in zip(starts, ends, *place_C2.tolist(), strict=True):
            yield slice(start, end), slice(first, last + 1)


def chunk_losses(
    draft_nV: Tensor, target_uV: Tensor, place_n: Tensor, label_n: Tensor, rows: Rows, *, learn: bool = True
) -> tuple[SlotLosses, Tensor | None]:
    """(`slot_losses`, their scaled sum's gradient by the draft logits [n, V]), in closed form and in place.

    With q = p_d, p = p_t and s = sign(q − p): d CE = q − 1[label], d l1 = q(s − Σ q s), d KL = q − p.
    """
    scale, draft_ids_V = rows.scale, rows.draft_ids_V
    target_uV, log_q_nV = widen(target_uV), widen(draft_nV).log_softmax(-1)
    known_n = (label_n >= 0).to(log_q_nV.dtype)
    index_n1 = label_n.clamp(min=0)[:, None]
    cross_entropy_n = -log_q_nV.gather(1, index_n1)[:, 0] * known_n
    mass_n1 = None
    if draft_ids_V is not None:
        all_u1 = target_uV.logsumexp(-1, keepdim=True)
        target_uV = target_uV[:, draft_ids_V]
        mass_n1 = (target_uV.logsumexp(-1, keepdim=True) - all_u1).exp()[place_n]
    p_nV = target_uV.softmax(-1)[place_n]
    kl_n = torch.zeros_like(cross_entropy_n)
    if scale.kl:
        kl_n = torch.linalg.vecdot(target_uV.log_softmax(-1)[place_n].sub_(log_q_nV), p_nV)
    q_nV = log_q_nV.exp_()
    gap_nV = q_nV - (p_nV if mass_n1 is None else p_nV * mass_n1)
    q_n = q_nV.gather(1, index_n1)[:, 0]
    taken_n = known_n * (q_n / (q_n - gap_nV.gather(1, index_n1)[:, 0]).clamp(min=SMALLEST)).clamp(max=1)
    sign_nV = gap_nV.sign() if learn else gap_nV
    l1_n = gap_nV.abs_().sum(-1)
    if mass_n1 is not None:
        l1_n = l1_n + (1 - mass_n1[:, 0])
    losses = SlotLosses(cross_entropy_n, l1_n, kl_n, 1 - l1_n / 2, taken_n)
    if not learn:
        return losses, None
    inner_n = torch.linalg.vecdot(q_nV, sign_nV)
    constant_n1 = (scale.cross_entropy * known_n + scale.kl - scale.l1 * inner_n)[:, None]
    gradient_nV = sign_nV.mul_(scale.l1).add_(constant_n1).mul_(q_nV)
    if scale.kl:
        gradient_nV.sub_(p_nV, alpha=scale.kl)
    return losses, gradient_nV.scatter_add_(1, index_n1, (-scale.cross_entropy * known_n)[:, None])


class WeightedLoss(torch.autograd.Function):
    """Σ_n weight_n · (scaled losses of slot n). Gradients are made beside the values."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, learn: bool, hidden_ND: Tensor, latent_Nr: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = [hidden_ND] if latent_Nr is None else [hidden_ND, latent_Nr]
        by_row = [torch.zeros_like(x) for x in inputs] if learn else []
        by_parameter: list[Tensor | None] = [None] * len(parameters)
        parts = []
        for some, places in rows.chunks(vocabulary_of(rows, inputs)) if len(hidden_ND) else ():
            losses, found = one_chunk(rows, some, places, inputs, parameters if learn else None)
            parts.append(losses)
            for whole, gradient in zip(by_row, found, strict=False):
                if gradient is not None:
                    whole[some] = gradient
            for index, gradient in enumerate(found[len(inputs) :]):
                by_parameter[index] = added(by_parameter[index], gradient)
        values = joined(parts, rows.weight_N)
        scaled_N = rows.scale.cross_entropy * values.cross_entropy + rows.scale.l1 * values.l1
        loss = ((scaled_N + rows.scale.kl * values.kl) * rows.weight_N).sum()
        ctx.gradients = (*by_row, *([None] if latent_Nr is None else []), *by_parameter)
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return loss, *values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None, None, *(None for _ in ctx.gradients))
        return (None, None, *(None if x is None else x * gradient for x in ctx.gradients))


def one_chunk(
    rows: Rows, some: slice, places: slice, inputs: Sequence[Tensor], parameters: Sequence[Tensor] | None
) -> tuple[SlotLosses, tuple[Tensor | None, ...]]:
    """The losses of some slots, and the gradients of hidden rows, latents and `parameters`, () where these are None."""
    learn = parameters is not None
    leaves = [x[some].detach().requires_grad_(learn) for x in inputs]
    with torch.set_grad_enabled(learn):
        draft_nV = rows.draft(leaves[0], leaves[1] if len(leaves) > 1 else None)
    with torch.no_grad():
        place_n, label_n = rows.place_N[some] - places.start, rows.label_N[some]
        losses, gradient_nV = chunk_losses(draft_nV.detach(), rows.target(places), place_n, label_n, rows, learn=learn)
    if gradient_nV is None or parameters is None:
        return losses, ()
    gradient_nV = gradient_nV.mul_(rows.weight_N[some, None]).to(draft_nV.dtype)
    return losses, torch.autograd.grad(draft_nV, [*leaves, *parameters], gradient_nV, allow_unused=True)


def added(so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Their sum, in place; a chunk may leave a parameter unread."""
    if so_far is None or gradient is None:
        return so_far if gradient is None else gradient
    return so_far.add_(gradient)


def weighted_loss(
    rows: Rows, hidden_ND: Tensor, latent_Nr: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, SlotLosses]:
    """(Σ_n weight_n · loss_n with its gradient, the losses of every slot without).

    Gradients reach the hidden rows, the latents and those of `parameters` that `rows.draft` reads.
    """
    loss, *values = WeightedLoss.apply(rows, torch.is_grad_enabled(), hidden_ND, latent_Nr, *parameters)
    return loss, SlotLosses(*values)


def vocabulary_of(rows: Rows, inputs: Sequence[Tensor]) -> int:
    """How wide the wider of the two logits is, from one slot."""
    with torch.no_grad():
        draft_1V = rows.draft(inputs[0][:1], inputs[1][:1] if len(inputs) > 1 else None)
        return max(draft_1V.shape[-1], rows.target(slice(0, 1)).shape[-1])


def joined(parts: list[SlotLosses], like_N: Tensor) -> SlotLosses:
    """The losses of all chunks as one."""
    if not parts:
        return SlotLosses(*(torch.zeros_like(like_N) for _ in SlotLosses._fields))
    return SlotLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))
