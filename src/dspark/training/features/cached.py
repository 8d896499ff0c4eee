"""Features read back from a store; what the store lacks, the target says now.

B rows, S tokens, n supervised positions of a piece, W = k·D, D hidden size, k taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark.training.anchors import eligible
from dspark.training.data import Batch, Span
from dspark.training.features.encoding import Encoding, Piece
from dspark.training.features.online import OnlineTarget
from dspark.training.features.store import Store


class CachedFeatures:
    """Each piece's features are computed once and rounded as the encoding says, the first time too.

    So a step reads the same numbers whether they come from the store or not. Last hidden states are kept where a loss
    can read them: at supervised positions whose next token is supervised. Elsewhere they come back as zeros.
    `admits` says which pieces may be kept.
    """

    def __init__(
        self, target: OnlineTarget, store: Store, encoding: Encoding, admits: Callable[[int], bool] = lambda _: True
    ) -> None:
        self.target, self.store, self.encoding, self.admits = target, store, encoding, admits
        self.logits = target.logits
        self.dtype = next(target.decoder.parameters()).dtype

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(taps [B, S, W], last [B, S, D]) on the batch's device."""
        spans, wanted_BS = batch.spans, eligible(batch)
        found = [self.store.get(span.piece) for span in spans]
        missing = [index for index, data in enumerate(found) if data is None]
        if missing:
            for index, fresh in zip(missing, self.run(batch, [spans[i] for i in missing], wanted_BS), strict=True):
                found[index] = fresh
        place, (B, S) = batch.token_BS.device, batch.token_BS.shape
        taps_BSW = torch.zeros(B, S, self.encoding.taps, dtype=self.dtype, device=place)
        last_BSD = torch.zeros(B, S, self.encoding.hidden, dtype=self.dtype, device=place)
        for (_, row, begin, end), data in zip(spans, found, strict=True):
            assert data is not None
            piece = self.encoding.decode(data.to(place), end - begin, self.dtype)
            taps_BSW[row, begin:end] = piece.taps_SW
            last_BSD[row, begin:end][wanted_BS[row, begin:end]] = piece.last_nD
        return taps_BSW, last_BSD

    def run(self, batch: Batch, spans: list[Span], wanted_BS: Tensor) -> list[Tensor]:
        """Some encoded pieces of a batch, from the target; those that may be kept are.

        The target always meets the whole batch: a piece's numbers are those of the step it first came in, to the bit,
        also where a run that was killed does that step again.
        """
        taps_BSW, last_BSD = self.target(batch)
        found = []
        for piece, row, begin, end in spans:
            wanted_S = wanted_BS[row, begin:end]
            data = self.encoding.encode(Piece(taps_BSW[row, begin:end], last_BSD[row, begin:end][wanted_S]))
            if self.admits(piece):
                self.store.put(piece, data)
            found.append(data)
        return found

    def flush(self) -> None:
        """Whatever was made so far survives a kill from here on."""
        self.store.flush()
