"""Draws draft tokens the way each request samples: the drafter's side of both acceptance rules."""

from __future__ import annotations

from torch import Tensor

from dspark.ops.chain import Tempered
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, shape
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise


class DraftSampler:
    """The TokenSampler of one round: shape the logits as the target's will be, then draw with the round's noise.

    Rejection requests draw from q by inverse CDF; coupled ones take argmax(log q + g). Slots are drawn in order.
    """

    def __init__(
        self, shaping: Shaping, noise: RoundNoise, history: History | None = None, guide: Guide | None = None
    ) -> None:
        self.shaping = shaping
        self.noise = noise
        self.history = history  # of the committed tokens; only penalties need it
        self.guide = guide  # where a request has a grammar

    @property
    def tempered(self) -> Tempered | None:
        """Knobs and numbers of every request, where nothing else but its grammar shapes a law; else None."""
        knobs_R4 = self.shaping.knobs_R4
        if knobs_R4 is None:
            return None
        keys = self.noise.keys
        return Tempered(knobs_R4, self.noise.draft_RK, keys if keys is None else keys[:, :-1])

    def draw(self, logits_RV: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Draw slot `slot` of every request: (token_R, the law probability_RV it came from).

        Logits that are not numbers give the last token and a law that verification always rejects.
        """
        if self.guide is not None:
            logits_RV = self.guide.draft_logits(logits_RV, slot)
        probability_RV = shape(logits_RV, self.shaping, self.history)
        token_R = self.noise.pick(probability_RV, slot).clamp_(max=probability_RV.shape[1] - 1)
        if self.history is not None:
            self.history = self.history.advanced(token_R)
        if self.guide is not None:
            self.guide.take(token_R)
        return token_R, probability_RV
