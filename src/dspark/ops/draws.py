"""How the requests of a round draw their drafted tokens, as numbers that a kernel can draw by.

R requests, K draft slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Everything that the tokens of a block depend on but its logits."""

    knobs_R4: Tensor  # float64: temperature, top-k, top-p, min-p (`Shaping.knobs_R4`)
    uniform_RK: Tensor  # float64 in (0, 1], one number a draw
    key_RK: Tensor | None = None  # int64: of the race that is run instead (`ops.races`), 0 where none is; None: nowhere
    adjusted: Callable[[Tensor], Tensor] | None = None  # gives logits [R, K, V] their penalties and biases; None: none

    def slots(self, which: slice) -> Draws:
        """The numbers of some slots."""
        keys = self.key_RK if self.key_RK is None else self.key_RK[:, which]
        return replace(self, uniform_RK=self.uniform_RK[:, which], key_RK=keys)


def draw_slot(logits_RV: Tensor, draws: Draws, slot: int) -> tuple[Tensor, Tensor]:
    """One slot's tokens [R] and the laws they were drawn from, float32 [R, V], by the kernel.

    A slot of `draft_chain` that no head changes. Logits that are not numbers give the last token.
    """
    keys = draws.key_RK if draws.key_RK is None else draws.key_RK[:, slot]
    return torch.ops.dspark.draw_slot.default(logits_RV, draws.knobs_R4, draws.uniform_RK[:, slot], keys)
