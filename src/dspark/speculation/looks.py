"""What choosing among drafted tokens by their confidences would have won, from rounds that were verified whole.

N requests' rounds, K draft slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dspark.speculation.round import Array, Outcome

REMEMBERED = 128  # requests' rounds


class Looks:
    """Survivals and outcomes of whole drafts of the newest looks, all as wide as any."""

    def __init__(self) -> None:
        self.survival_NK = np.zeros((0, 0))
        self.accepted_N = np.zeros(0)

    def remember(self, rounds: Sequence[Outcome]) -> None:
        """Keep the widest of the rounds of one look, whose plans were all that was drafted."""
        slots = max(o.survival_RK.shape[1] for o in rounds if o.survival_RK is not None)
        survivals: list[Array] = []
        accepted: list[int] = []
        whole: list[bool] = []
        for outcome in rounds:
            if outcome.survival_RK is not None and outcome.survival_RK.shape[1] == slots:
                survivals.append(outcome.survival_RK)
                accepted += outcome.accepted_R
                whole += [limit == slots for limit in outcome.round.limit_R]
        survival_NK, accepted_N = np.concatenate(survivals)[whole], np.array(accepted)[whole]
        if self.survival_NK.shape[1] == slots:
            survival_NK = np.concatenate([self.survival_NK, survival_NK])
            accepted_N = np.append(self.accepted_N, accepted_N)
        self.survival_NK, self.accepted_N = survival_NK[-REMEMBERED:], accepted_N[-REMEMBERED:]

    def options(self, most: int, price: float) -> Array:
        """Tokens that choosing rows from a draft of n slots wins over the best fixed number of them, by n: [most].

        A row costs `price` tokens; the rows chosen are those that the survivals say are worth most. It goes by what
        became of them, less a standard error: confidences that tell nothing win nothing, however sure they are, nor
        does luck in a few rounds, which the fixed number has as well.
        """
        option_K = np.zeros(most)
        if not len(self.survival_NK):
            return option_K
        survival_NK = self.survival_NK[:, :most]
        slot_K = np.arange(1, survival_NK.shape[1] + 1)
        gain_NK = np.cumsum(survival_NK - price, axis=1)
        best_NK = np.maximum.accumulate(np.maximum(gain_NK, 0.0), axis=1)
        chosen_NK = np.maximum.accumulate(slot_K * (gain_NK == best_NK), axis=1)
        came_N1 = self.accepted_N[:, None]
        fixed_NK = np.minimum(came_N1, slot_K) - price * slot_K
        mean_K = fixed_NK.mean(0)
        width_K = np.maximum.accumulate(np.where(mean_K == np.maximum.accumulate(mean_K), slot_K - 1, 0))
        won_NK = np.minimum(came_N1, chosen_NK) - price * chosen_NK - fixed_NK[:, width_K]
        option_K[: len(slot_K)] = won_NK.mean(0) - won_NK.std(0) / math.sqrt(len(won_NK))
        return option_K
