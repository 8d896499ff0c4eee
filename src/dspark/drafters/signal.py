"""How sure a drafter without a confidence head is: a logistic on the shape of its own distributions.

... leading dimensions, R requests, V vocabulary, F = 3 features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES = ("odds", "margin", "entropy")
MOST = 12.0  # of odds and margin; a point mass has both without bound


def features(logits: Tensor) -> Tensor:
    """Of logits [..., V]: the largest probability's log-odds, its lead in logarithms, the entropy in nats; [..., F].

    They see the distribution alone, never what is drawn from it, so a slot's depend on the tokens before it only.
    """
    log_V = logits.float().log_softmax(-1)
    best_2 = log_V.topk(2, dim=-1).values
    odds = best_2[..., 0] - torch.log(-torch.expm1(best_2[..., 0]))
    margin = best_2[..., 0] - best_2[..., 1]
    return torch.stack((odds.clamp(max=MOST), margin.clamp(max=MOST), torch.special.entr(log_V.exp()).sum(-1)), -1)


@dataclass(frozen=True)
class Signal:
    """σ(bias + Σ weight · feature). `dspark calibrate` fits one for its drafter."""

    bias: float
    odds: float
    margin: float
    entropy: float

    def confidence(self, feature_F: Tensor) -> Tensor:
        """The chance that a slot is accepted, [...], from its features [..., F]."""
        weight_F = feature_F.new_tensor((self.odds, self.margin, self.entropy))
        return torch.sigmoid(feature_F @ weight_F + self.bias)

    def as_list(self) -> list[float]:
        """Bias and weights in the order of FEATURES."""
        return [self.bias, self.odds, self.margin, self.entropy]


LARGEST = Signal(0.0, 1.0, 0.0, 0.0)  # the largest probability itself
