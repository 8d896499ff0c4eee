"""What a training step and an evaluation report: sums that stay on the device until the log reads them.

B sequences, A anchors, K block slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.training.objectives import Objective

Sums = dict[str, Tensor]


def measure(goals: Sequence[Objective]) -> Sums:
    """Sums over micro-batches. A block survives to slot k with Π_{j≤k} Σ min(p, q), the prefix being the true text."""
    accepted = [goal.acceptance_BAK * goal.mask_BAK for goal in goals]
    totals: Sums = {
        "parts": torch.tensor(float(len(goals))),
        "accepted_K": torch.stack([part.sum((0, 1)) for part in accepted]).sum(0),
        "survived_K": torch.stack([part.cumprod(-1).sum((0, 1)) for part in accepted]).sum(0),
        "counted_K": torch.stack([goal.mask_BAK.sum((0, 1)) for goal in goals]).sum(0),
    }
    for name in ("total", "cross_entropy", "l1", "kl", "confidence"):
        totals[name] = torch.stack([getattr(goal, name).detach() for goal in goals]).sum()
    return totals


def combine(steps: Sequence[Sums]) -> Sums:
    """Sums over steps."""
    return {name: torch.stack([step[name] for step in steps]).sum(0) for name in steps[0]}


def readable(sums: Sums) -> dict[str, Any]:
    """Losses, acceptance by position, and the τ that the drafter would reach: 1 + Σ_k survival to k."""
    parts = float(sums["parts"])
    count_K = sums["counted_K"].clamp(min=1)
    result: dict[str, Any] = {"loss": float(sums["total"]) / parts}
    result |= {name: float(sums[name]) / parts for name in ("cross_entropy", "l1", "kl", "confidence")}
    result["acceptance"] = [round(x, 4) for x in (sums["accepted_K"] / count_K).tolist()]
    result["tau"] = 1 + float((sums["survived_K"] / count_K).sum())
    return result
