"""DSpark: the parallel backbone, a sequential Markov head over its base logits, and a confidence head.

R requests, K block slots, C candidates of a restricted head, V vocabulary, D hidden size, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext, Rules
from dspark.drafters.body import Body
from dspark.drafters.drawing import Drawing
from dspark.drafters.heads import ConfidenceHead, VanillaMarkov
from dspark.drafters.lesson import Blocks, Lesson, following
from dspark.drafters.native import NativeRound, Rows, stack_of
from dspark.drafters.signal import LARGEST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.ops.chain import draft_chain
from dspark.ops.cpu import has_kernel
from dspark.ops.draws import Draws
from dspark.ops.linear import pack, pack_linears, packable


class DSpark(nn.Module):
    """Drafts γ tokens: one parallel pass for base logits U, then token by token softmax(U_k + B_k) (DSpark, eq. 4).

    `markov_top_k` > 0 restricts every slot to the K largest base logits; all other tokens then have probability 0 in
    the distribution that is sampled and reported, so verification stays exact.
    """

    every_position, draft_ids = False, None

    rows_apart = True
    signal: Signal = LARGEST  # of one without a confidence head

    def __init__(
        self,
        body: Body,
        markov: VanillaMarkov,
        confidence: ConfidenceHead | None,
        *,
        taps: tuple[int, ...],
        block_size: int,
        markov_top_k: int = 0,
    ) -> None:
        super().__init__()
        self.body = body
        self.markov_head = markov
        self.confidence_head = confidence
        self.taps = taps
        self.block_size = block_size
        self.markov_top_k = markov_top_k
        self.packed_w2: Tensor | None = None
        self._round: NativeRound | None = None
        self._pending: Rows | tuple[()] = ()  # rows that the next round takes with it

    def pack(self) -> None:
        """Put weights into the CPU kernels' layout, where there is one; the sequential head's are read by rows too."""
        pack_linears(self.body)
        w2_Vr = self.markov_head.markov_w2.weight
        if self.markov_top_k == 0 and type(self.markov_head) is VanillaMarkov and packable(w2_Vr):
            self.packed_w2 = pack(w2_Vr.detach())

    def allocate(self, pages: int, page_size: int) -> None:
        self.body.allocate(pages, page_size)
        self._round, self._pending = None, ()

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        graphs = self.body.compile_forwards()
        stack, head, packed = stack_of(self.body), self.confidence_head, self.packed_w2
        if all(graph.native for graph in graphs) and stack is not None and head is not None and packed is not None:
            self._round = None if self.body.skip else NativeRound(self.body, stack, self.markov_head, head, packed)
        return graphs

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        assert taps_TD is not None, "DSpark reads the target's hidden states"
        self._catch_up()
        if self._round is None:
            self.body.extend(batch, taps_TD)
        else:
            self._pending = (taps_TD, batch.position_T, batch.slot_T)

    def _catch_up(self) -> None:
        if self._pending:
            self.body.extend_rows(*self._pending)
            self._pending = ()

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        draws, rules, head = context.draws, context.rules, self.confidence_head
        if self._round is not None and draws is not None and draws.adjusted is None and rules is None:
            pending, self._pending = self._pending, ()
            return self._round(pending, context, draws)
        self._catch_up()
        hidden_RKD, base_RKV = self.body.draft(context)
        if draws is None or head is None or type(self.markov_head) is not VanillaMarkov or not has_kernel(base_RKV):
            return self.sequential(context, hidden_RKD, base_RKV)
        if rules is not None and self.packed_w2 is None:  # whoever restricts a slot looks at unmasked base logits
            return self.sequential(context, hidden_RKD, base_RKV)
        if draws.adjusted is not None:
            base_RKV = draws.adjusted(base_RKV)
        return self.chain(context.anchor_R, hidden_RKD, base_RKV, draws, head, rules)

    def chain(
        self,
        anchor_R: Tensor,
        hidden_RKD: Tensor,
        base_RKV: Tensor,
        draws: Draws,
        head: ConfidenceHead,
        rules: Rules | None = None,
    ) -> Draft:
        """What `sequential` does, by a kernel, for a vanilla head.

        In one call, or with rules in one a slot: a base logit of −inf is a token that is not drawn.
        """
        w1_Vr, w2_Vr = self.markov_head.markov_w1.weight, self.markov_head.markov_w2.weight
        seen_RK, seen_r = head.split(hidden_RKD)

        def drawn(base_RKV: Tensor, previous_R: Tensor, slots: slice) -> tuple[Tensor, Tensor, Tensor]:
            own = draws.slots(slots)
            rest = (self.markov_top_k, seen_RK[:, slots], seen_r, self.packed_w2)
            return draft_chain(base_RKV, w1_Vr, w2_Vr, previous_R, own, *rest)

        if rules is None:
            token_RK, law_RKV, logit_RK = drawn(base_RKV, anchor_R, slice(None))
        else:
            parts, token_R = [], anchor_R
            for slot in range(base_RKV.shape[1]):
                allowed_R1V = rules.draft_logits(base_RKV[:, slot], slot).unsqueeze(1)
                parts.append(drawn(allowed_R1V, token_R, slice(slot, slot + 1)))
                token_R = parts[-1][0][:, 0]
                rules.take(token_R)
            token_RK, law_RKV, logit_RK = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return Draft(token_RK, law_RKV, torch.sigmoid(logit_RK), [token_RK.shape[1]] * len(anchor_R))

    def sequential(self, context: DraftContext, hidden_RKD: Tensor, base_RKV: Tensor) -> Draft:
        """Draw the block left to right; slot 1's previous token is the anchor (DSpark, eqs. 4–7)."""
        head, state_Rr, token_R = self.confidence_head, self.markov_head.start(hidden_RKD[:, 0]), context.anchor_R
        candidates = base_RKV.topk(self.markov_top_k, dim=-1) if 0 < self.markov_top_k < base_RKV.shape[-1] else None
        # the backbone's pass is paid for: a slot more is cheap, so no block ends early
        drawing = Drawing(replace(context, wanted=context.wanted and head is None, going_on=None), self.signal)
        embeddings = []
        for slot in range(hidden_RKD.shape[1]):
            embedding_Rr = self.markov_head.markov_w1(token_R)
            latent_Rr, state_Rr = self.markov_head.latent(embedding_Rr, hidden_RKD[:, slot], state_Rr)
            if candidates is None:
                logits_RV = base_RKV[:, slot] + self.markov_head.markov_w2(latent_Rr)
            else:
                logits_RV = self.restricted(latent_Rr, candidates.values[:, slot], candidates.indices[:, slot])
            token_R = drawing.draw(logits_RV)
            embeddings.append(embedding_Rr)
        draft = drawing.draft()
        if head is None:
            return draft
        # slot k's logit reads h_k and x_{k-1}: all at once is the same as one by one
        return replace(draft, confidence_RK=head(hidden_RKD, torch.stack(embeddings, dim=1)).float().sigmoid())

    def restricted(self, latent_Rr: Tensor, base_RC: Tensor, candidate_RC: Tensor) -> Tensor:
        """Logits [R, V] that are −inf outside the candidates; W2 is read at the candidates' rows alone."""
        bias_RC = torch.einsum("rck,rk->rc", self.markov_head.markov_w2.weight[candidate_RC], latent_Rr)
        empty_RV = base_RC.new_full((len(base_RC), self.markov_head.markov_w2.out_features), float("-inf"))
        return empty_RV.scatter(1, candidate_RC, base_RC + bias_RC)

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def forward(self, lesson: Lesson) -> Blocks:
        """Every block of every row; the previous token of slot k is the true one (DSpark, §3.3)."""
        hidden_BAKD = self.body.blocks(lesson, self.block_size)
        previous_BAK = following(lesson.token_BS, lesson.anchor_BA, self.block_size)
        embedding_BAKr = self.markov_head.markov_w1(previous_BAK)
        latent_BAKr = self.markov_head.unroll(embedding_BAKr, hidden_BAKD)
        head = self.confidence_head
        return Blocks(hidden_BAKD, latent_BAKr, None if head is None else head(hidden_BAKD, embedding_BAKr))

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        """U + B (DSpark, eq. 4)."""
        return self.body.logits(hidden_ND) + self.markov_head.markov_w2(latent_Nr)
