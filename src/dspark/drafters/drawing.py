"""A block drawn slot by slot by a drafter without a confidence head.

R requests, K slots, V vocabulary, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.signal import Signal, features


class Drawing:
    """Collects slots in order. A slot's confidence comes from its untempered logits alone, before the draw."""

    def __init__(self, context: DraftContext, signal: Signal) -> None:
        self.context = context
        self.signal = signal
        self.tokens: list[Tensor] = []
        self.laws: list[Tensor] = []
        self.features: list[Tensor] = []
        self.ended = False  # whether drafting the next slot does not pay, by `context.going_on`

    def draw(self, logits_RV: Tensor) -> Tensor:
        """Draw the next slot of every request; token_R."""
        context, slot = self.context, len(self.tokens)
        if context.wanted or context.going_on is not None:
            self.features.append(features(logits_RV))
        if context.going_on is not None and slot + 1 < context.slots:
            self.ended = not context.going_on(self.signal.confidence(self.features[-1]))
        token_R, law_RV = context.sampler.draw(logits_RV, slot)
        self.tokens.append(token_R)
        self.laws.append(law_RV)
        return token_R

    def draft(self) -> Draft:
        """What was drawn."""
        token_RK = torch.stack(self.tokens, dim=1)
        feature_RKF = torch.stack(self.features, dim=1) if self.features else None
        return drafted(token_RK, torch.stack(self.laws, dim=1), feature_RKF, self.signal)


def drafted(token_RK: Tensor, law_RKV: Tensor, feature_RKF: Tensor | None, signal: Signal) -> Draft:
    """Full blocks; without features, which then nobody wants, no confidence is a number."""
    if feature_RKF is None:
        confidence_RK = torch.full(token_RK.shape, torch.nan, device=token_RK.device)
    else:
        confidence_RK = signal.confidence(feature_RKF)
    return Draft(token_RK, law_RKV, confidence_RK, [token_RK.shape[1]] * len(token_RK), feature_RKF)
