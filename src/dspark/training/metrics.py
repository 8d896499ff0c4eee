"""What a training step and an evaluation report: sums that stay on the device until the log reads them.

B rows, S positions, A anchors, K block slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.training.anchors import eligible
from dspark.training.data import Batch
from dspark.training.objectives import Objective

Sums = dict[str, Tensor]
LOSSES = ("cross_entropy", "l1", "kl", "confidence")


def measure(goals: Sequence[Objective]) -> Sums:
    """Sums over micro-batches, the losses by weight, so that a step's mean does not depend on how it was cut.

    A block survives to slot k with Π_{j≤k} Σ min(p, q), the prefix being the true text.
    """
    accepted = [goal.acceptance_BAK * goal.mask_BAK for goal in goals]
    totals: Sums = {
        "weight": torch.stack([goal.weight for goal in goals]).sum(),
        "accepted_K": torch.stack([part.sum((0, 1)) for part in accepted]).sum(0),
        "survived_K": torch.stack([part.cumprod(-1).sum((0, 1)) for part in accepted]).sum(0),
        "counted_K": torch.stack([goal.mask_BAK.sum((0, 1)) for goal in goals]).sum(0).float(),
    }
    for name in ("total", *LOSSES):
        totals[name] = torch.stack([getattr(goal, name).detach() * goal.weight for goal in goals]).sum()
    return totals


def combine(steps: Sequence[Sums]) -> Sums:
    """Sums over steps."""
    return {name: torch.stack([step[name] for step in steps]).sum(0) for name in steps[0]}


def readable(sums: Sums) -> dict[str, Any]:
    """Losses, acceptance by position, and τ over the blocks that were trained on: 1 + Σ_k survival to k.

    Blocks stand everywhere alike, rounds of the engine more often where drafting fails: this τ is too high, `predicted`
    has the right one.
    """
    weight = float(sums["weight"]) or 1.0
    count_K = sums["counted_K"].clamp(min=1)
    result: dict[str, Any] = {"loss": float(sums["total"]) / weight}
    result |= {name: float(sums[name]) / weight for name in LOSSES}
    result["acceptance"] = rounded(sums["accepted_K"] / count_K)
    result["tau"] = 1 + float((sums["survived_K"] / count_K).sum())
    return result


def walk(batch: Batch, taken_BSK: Tensor) -> Sums:
    """What the engine would do at temperature 1 on text the target wrote, in expectation, answer by answer.

    Given that the text was committed, slot k of a round was accepted with min(1, q(x)/p(x)) = taken, where those before
    it were. So rounds follow one another as a chain over the text's positions: the chance f_s that one begins at
    position s, with anchor s, is known from those before. The last round of an answer has no more slots than tokens.
    """
    eligible_BS = eligible(batch)
    rows, width, slots = taken_BSK.shape
    left_BS = torch.zeros(rows, width + 1, dtype=torch.long, device=eligible_BS.device)
    for s in reversed(range(width)):
        left_BS[:, s] = torch.where(eligible_BS[:, s], left_BS[:, s + 1] + 1, 0)
    left_BS = left_BS[:, :width]
    fits_BSK = torch.arange(1, slots + 1, device=left_BS.device) < left_BS[..., None]
    survival_BSK = (taken_BSK * fits_BSK).cumprod(-1)
    reach_BSK = torch.cat([torch.ones_like(survival_BSK[..., :1]), survival_BSK], dim=-1)  # slots 0..K
    stop_BSK = reach_BSK - torch.nn.functional.pad(survival_BSK, (0, 1))
    begin_BS = torch.nn.functional.pad(firsts(batch, eligible_BS).to(reach_BSK.dtype), (0, slots + 1))
    for s in range(width):
        here_B1 = begin_BS[:, s, None] * eligible_BS[:, s, None]
        begin_BS[:, s + 1 : s + 2 + slots] += here_B1 * stop_BSK[:, s]
    begin_BS1 = (begin_BS[:, :width] * eligible_BS)[..., None]
    return {
        "rounds": begin_BS1.sum(),
        "committed": (begin_BS1 * reach_BSK).sum(),
        "reached_K": (begin_BS1 * reach_BSK[..., :-1] * fits_BSK).sum((0, 1)),
        "accepted_K": (begin_BS1 * survival_BSK).sum((0, 1)),
    }


def firsts(batch: Batch, eligible_BS: Tensor) -> Tensor:
    """Where answers begin, [B, S]: a position that is eligible and follows none of its document that is."""
    before_BS = torch.zeros_like(eligible_BS)
    before_BS[:, 1:] = eligible_BS[:, :-1] & (batch.start_BS[:, 1:] == batch.start_BS[:, :-1])
    return eligible_BS & ~before_BS


def predicted(sums: Sums) -> dict[str, Any]:
    """τ and the conditional acceptance at each position that `walk` expects."""
    acceptance_K = sums["accepted_K"] / sums["reached_K"].clamp(min=1e-9)
    tau = float(sums["committed"]) / max(float(sums["rounds"]), 1e-9)
    return {"acceptance": rounded(acceptance_K), "tau": tau}


def rounded(x_K: Tensor) -> list[float]:
    """Four places, for a log."""
    return [round(x, 4) for x in x_K.tolist()]
