"""Draws draft tokens the way each request samples: the drafter's side of both acceptance rules."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from dspark.ops.cpu import has_kernel
from dspark.ops.draws import Draws, draw_slot
from dspark.ops.history import History
from dspark.ops.sampling import Shaping, adjust, shape
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

    @cached_property
    def draws(self) -> Draws:
        """How every request draws, for kernels; `draw` does the rest."""
        keys = self.noise.keys
        adjusted = self._adjusted if self.shaping.adjusts else None
        return Draws(self.shaping.knobs_R4, self.noise.draft_RK, keys if keys is None else keys[:, :-1], adjusted)

    def _adjusted(self, logits_RKV: Tensor) -> Tensor:
        """A block's logits after biases and the penalties of the text before it; those of its own tokens stay away.

        The law that a token is drawn from may be any: what is missed here, verification makes good.
        """
        requests, slots, vocabulary = logits_RKV.shape
        history = self.history and self.history.select([r for r in range(requests) for _ in range(slots)])
        adjusted_BV = adjust(logits_RKV.reshape(-1, vocabulary), self.shaping.repeat([slots] * requests), history)
        return adjusted_BV.to(logits_RKV.dtype).view_as(logits_RKV)

    def draw(self, logits_RV: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Draw slot `slot` of every request: (token_R, the law probability_RV it came from).

        Logits that are not numbers give the last token and a law that verification always rejects.
        """
        if self.guide is not None:
            logits_RV = self.guide.draft_logits(logits_RV, slot)
        token_R, probability_RV = self._drawn(logits_RV, slot)
        if self.history is not None:
            self.history = self.history.advanced(token_R)
        if self.guide is not None:
            self.guide.take(token_R)
        return token_R, probability_RV

    def _drawn(self, logits_RV: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        if has_kernel(logits_RV):
            if self.shaping.adjusts:
                logits_RV = adjust(logits_RV, self.shaping, self.history)
            return draw_slot(logits_RV, self.draws, slot)
        probability_RV = shape(logits_RV, self.shaping, self.history)
        return self.noise.pick(probability_RV, slot).clamp_(max=probability_RV.shape[1] - 1), probability_RV
