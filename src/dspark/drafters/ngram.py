"""Prompt lookup: drafts what followed the last occurrence of the newest tokens in the request's own text; no model.

R requests, K block slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph

MATCH_CONFIDENCE = (0.0, 0.25, 0.5, 0.65, 0.75)
"""Prior chance that a drafted token is accepted, by how many tokens matched; calibration refines it."""


class NGram:
    """The newest `longest`..`shortest` tokens are looked up in the history; the latest match wins.

    A drafted token was not drawn: its distribution is a point mass, under which the rejection rule accepts it with
    the target's own probability of it.
    """

    taps: tuple[int, ...] = ()

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
        confidence_R1 = torch.tensor([[confidence] for _, confidence in found], dtype=torch.float32, device=device)
        law_RKV = torch.zeros(*shape, self.vocabulary, device=device).scatter_(-1, token_RK[..., None], 1.0)
        return Draft(token_RK, law_RKV, confidence_R1.expand(shape).clone(), [len(tokens) for tokens, _ in found])

    def look_up(self, history: Sequence[int], slots: int) -> tuple[list[int], float]:
        """(up to `slots` tokens that followed the longest, latest match, its confidence); ([], 0) without a match."""
        text = np.asarray(history, dtype=np.int64)
        for length in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
            starts = np.flatnonzero((windows == text[-length:]).all(axis=1))
            if len(starts):
                follow = starts[-1] + length
                tokens = text[follow : follow + slots].tolist()
                return tokens, MATCH_CONFIDENCE[min(length, len(MATCH_CONFIDENCE) - 1)]
        return [], 0.0


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
