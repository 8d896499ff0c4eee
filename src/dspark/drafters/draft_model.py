"""A smaller causal LM with the target's tokenizer as drafter: K one-token steps over its own paged keys and values.

R requests, K block slots, T tokens, V the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.drawing import Drawing
from dspark.drafters.signal import LARGEST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.pages import SCRATCH_PAGE, KVPool, slots_at
from dspark.models.target import Target


class DraftModel:
    """Standard speculative decoding (Leviathan 2023, Chen 2023).

    `extend` recomputes every committed token it is given, those drafted here included: what a round wrote past the
    anchor is then always overwritten before it is read, whatever was accepted, preempted or shared by prefix.
    """

    taps: tuple[int, ...] = ()
    signal: Signal = LARGEST
    pool: KVPool

    def __init__(self, model: Target, vocabulary: int, *, block_size: int = 5) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.block_size = block_size

    def allocate(self, pages: int, page_size: int) -> None:
        self.pool = self.model.allocate(pages, page_size)

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        return (self.model.compile((), self.pool.page_size),)

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        self.model.forward(batch, self.pool, batch.cu_query_R1.new_zeros(0, dtype=torch.long))

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        """Draw token by token. Past the end of a request's pages its keys go to the scratch page."""
        spare = -(-context.slots // self.pool.page_size)
        table_RP = torch.nn.functional.pad(context.page_table_RP, (0, spare), value=SCRATCH_PAGE)
        token_R, rows_R = context.anchor_R, torch.arange(len(context.anchor_R), device=context.anchor_R.device)
        drawing = Drawing(context, self.signal)
        for slot in range(context.slots):
            batch = self.step(token_R, context, table_RP, slot)
            logits_RV, _ = self.model.forward(batch, self.pool, rows_R)
            token_R = drawing.draw(fit_vocabulary(logits_RV, self.vocabulary))
            if drawing.ended:
                break
        return drawing.draft()

    def step(self, token_R: Tensor, context: DraftContext, table_RP: Tensor, slot: int) -> Ragged:
        """One query token a request at anchor + slot."""
        position_R = context.position_R + slot
        return Ragged(
            token_T=token_R,
            position_T=position_R,
            slot_T=slots_at(table_RP, position_R[:, None], self.pool.page_size)[:, 0],
            page_table_RP=table_RP,
            cu_query_R1=torch.arange(len(token_R) + 1, dtype=torch.int32, device=token_R.device),
            context_R=position_R.to(torch.int32),
        )


def fit_vocabulary(logits_RV: Tensor, vocabulary: int) -> Tensor:
    """Cut padding rows off, or add impossible tokens, where two models pad one tokenizer's vocabulary differently."""
    width = logits_RV.shape[-1]
    if width >= vocabulary:
        return logits_RV[:, :vocabulary]
    return torch.nn.functional.pad(logits_RV, (0, vocabulary - width), value=float("-inf"))
