"""Prompt lookup: drafts what followed the last occurrence of the newest tokens in the request's own text; no model.

R requests, K block slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.signal import MOST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph

MATCH_ODDS = (-MOST, -1.1, 0.0, 0.62, 1.1)
"""Log-odds that a drafted token is accepted, by how many tokens matched, before any calibration."""


class NGram:
    """The newest `longest`..`shortest` tokens are looked up in the history; the latest match wins.

    A drafted token was not drawn: its distribution is a point mass, under which the rejection rule accepts it with
    the target's own probability of it.
    """

    taps: tuple[int, ...] = ()
    signal = Signal(0.0, 1.0, 0.0, -0.5)

    def __init__(self, vocabulary: int, *, block_size: int = 7, longest: int = 4, shortest: int = 1) -> None:
        self.vocabulary = vocabulary
        self.block_size = block_size
        self.longest = longest
        self.shortest = shortest

    def allocate(self, pages: int, page_size: int) -> None:
        """Nothing to keep: the history arrives with every round."""

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Nothing to compile."""
        return ()

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Nothing to keep."""

    def propose(self, context: DraftContext) -> Draft:
        found = [self.look_up(history, context.slots) for history in context.history]
        device, shape = context.anchor_R.device, (len(found), context.slots)
        padded = [tokens + [0] * (context.slots - len(tokens)) for tokens, _ in found]
        token_RK = torch.tensor(padded, dtype=torch.long, device=device).view(shape)
        feature_RF = torch.tensor([features for _, features in found], dtype=torch.float32, device=device)
        feature_RKF = feature_RF[:, None].expand(*shape, feature_RF.shape[1])
        law_RKV = torch.zeros(*shape, self.vocabulary, device=device).scatter_(-1, token_RK[..., None], 1.0)
        length_R = [len(tokens) for tokens, _ in found]
        return Draft(token_RK, law_RKV, self.signal.confidence(feature_RKF), length_R, feature_RKF)

    def look_up(self, history: Sequence[int], slots: int) -> tuple[list[int], tuple[float, float, float]]:
        """Up to `slots` tokens that followed the longest, latest match, and its features; no tokens without a match.

        Features are the log-odds by length, the length, and the entropy of what followed all matches of that length.
        """
        text = np.asarray(history, dtype=np.int64)
        for length in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
            starts = np.flatnonzero((windows == text[-length:]).all(axis=1))
            if len(starts):
                follow = starts[-1] + length
                share_N = np.unique(text[starts + length], return_counts=True)[1] / len(starts)
                odds = MATCH_ODDS[min(length, len(MATCH_ODDS) - 1)]
                return text[follow : follow + slots].tolist(), (odds, length, float(-share_N @ np.log(share_N)))
        return [], (MATCH_ODDS[0], 0.0, 0.0)


class NoDraft:
    """Plain decoding: every draft has length 0."""

    taps: tuple[int, ...] = ()
    block_size = 0

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def allocate(self, pages: int, page_size: int) -> None:
        """Nothing to keep."""

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Nothing to compile."""
        return ()

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Nothing to keep."""

    def propose(self, context: DraftContext) -> Draft:
        anchor_R = context.anchor_R
        token_R0 = anchor_R.new_zeros((len(anchor_R), 0))
        law_R0V = torch.zeros(len(anchor_R), 0, self.vocabulary, device=anchor_R.device)
        return Draft(token_R0, law_R0V, law_R0V.new_zeros(token_R0.shape), [0] * len(anchor_R))
