"""A block drawn slot by slot by a drafter without a confidence head.

R requests, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from dspark.drafters.base import Draft, TokenSampler
from dspark.drafters.body import certainty


class Drawing:
    """Collects slots in order; a slot's confidence is the largest probability of its untempered logits."""

    def __init__(self, sampler: TokenSampler) -> None:
        self.sampler = sampler
        self.tokens: list[Tensor] = []
        self.laws: list[Tensor] = []
        self.confidences: list[Tensor] = []

    def draw(self, logits_RV: Tensor) -> Tensor:
        """Draw the next slot of every request; token_R."""
        token_R, law_RV = self.sampler.draw(logits_RV, len(self.tokens))
        self.tokens.append(token_R)
        self.laws.append(law_RV)
        self.confidences.append(certainty(logits_RV))
        return token_R

    def draft(self) -> Draft:
        """What was drawn."""
        return Draft.of_slots(self.tokens, self.laws, self.confidences)
