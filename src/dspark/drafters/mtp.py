"""Multi-token prediction modules in a row, as in DeepSeek-V3 (arXiv 2412.19437, §2.2): module k drafts token k.

Entry t of module k joins the hidden state of position t from the depth above with token t + k, so it is complete once
that token is committed. T ragged tokens, R requests, K modules = block slots, N rows,
B rows of S tokens with A anchors each in training, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.body import softcapped
from dspark.drafters.drawing import Drawing
from dspark.drafters.layers import Attend, BackboneConfig, Layer, RMSNorm, Rotary, RotaryEmbedding
from dspark.drafters.lesson import Blocks, Lesson, later, rows_at
from dspark.drafters.signal import LARGEST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.pages import slots_at
from dspark.ops.attention import ragged_attention, store
from dspark.ops.tail_attention import document_attention


class SharedHead(nn.Module):
    """The norm before the LM head that every module shares with the target."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(Layer):
    """One module: eh_proj[norm(embedding); norm(hidden)] through a block of the target's family."""

    def __init__(self, config: BackboneConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def join(self, embedding: Tensor, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """The next depth's hidden states [..., D], before its norm."""
        joined = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        return self(joined, rotary, attend)


class MTP(nn.Module):
    """K modules over the target's last layer; MTP-1 is one. Embedding and LM head are the target's.

    In the engine, module k keeps the keys and values of entry t at position t's slot, and the hidden states of the
    depth above it, because entry t waits for token t + k. A round proposes without writing: what the committed
    tokens have not completed yet is computed from the drafted ones and forgotten.
    """

    every_position, draft_ids = False, None
    signal: Signal = LARGEST
    hidden_KSD: list[Tensor]
    pools: list[tuple[Tensor, Tensor]]
    page_size: int

    def __init__(
        self, config: BackboneConfig, embed_tokens: nn.Embedding, lm_head: nn.Module, *, taps: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = config.num_hidden_layers
        self.embed_tokens = embed_tokens.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(False)
        self.layers = nn.ModuleList(MTPLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary = RotaryEmbedding(config)

    def module(self, depth: int) -> MTPLayer:
        """The module at a depth from 1 on."""
        return cast(MTPLayer, self.layers[depth - 1])

    def embed(self, token: Tensor) -> Tensor:
        return self.embed_tokens(token) * self.config.embedding_scale

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    def slot_logits(self, hidden: Tensor, latent: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., D] that went through their module's norm."""
        return softcapped(self.lm_head(hidden), self.config.logit_softcap)

    def forward(self, lesson: Lesson) -> Blocks:
        """Every module over whole rows beside the true tokens (DeepSeek-V3, eqs. 21–23), read before the anchors."""
        config, hidden_BAKD = self.config, []

        def attend(layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
            window = config.windows[layer] if config.windows else 0
            return document_attention(q_BSHd, k_BSGd, v_BSGd, lesson.start_BS, config.scale, window=window)

        hidden_BSD = lesson.taps_BSD.to(self.module(1).enorm.weight.dtype)
        rotary = self.rotary(lesson.position_BS, hidden_BSD.dtype)
        for depth in range(1, self.block_size + 1):
            module = self.module(depth)
            hidden_BSD = module.join(self.embed(later(lesson.token_BS, depth)), hidden_BSD, rotary, attend)
            read_BAD = module.shared_head.norm(rows_at(hidden_BSD, lesson.before_BA))
            hidden_BAKD.append(read_BAD * lesson.begun_BA1)
        return Blocks(torch.stack(hidden_BAKD, dim=2), None, None)

    def allocate(self, pages: int, page_size: int) -> None:
        """Pools of hidden states, keys and values for every module, addressed by the target's page table."""
        self.page_size, slots, like = page_size, pages * page_size, self.module(1).enorm.weight
        shape = (slots, self.config.num_key_value_heads, self.config.head_dim)
        self.hidden_KSD = [like.new_zeros(slots, self.config.hidden_size) for _ in self.layers]
        self.pools = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Nothing is compiled yet."""
        return ()

    @torch.inference_mode()
    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Keep the hidden states of a forward's rows, and complete at every depth the entries whose token arrived."""
        assert taps_TD is not None, "MTP reads the target's last hidden states"
        self.hidden_KSD[0][batch.slot_T] = taps_TD.to(self.hidden_KSD[0].dtype)
        for depth in range(1, self.block_size + 1):
            entries = completed(batch, depth, self.page_size)
            hidden_ND = self.run(depth, entries, self.hidden_KSD[depth - 1][entries.slot_T], keep=True)
            if depth < self.block_size:
                self.hidden_KSD[depth][entries.slot_T] = hidden_ND

    def run(self, depth: int, entries: Ragged, hidden_ND: Tensor, *, keep: bool) -> Tensor:
        """Hidden states [N, D] that a module gives its entries; `keep` stores their keys and values."""
        config, pools = self.config, self.pools[depth - 1]

        def attend(layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> Tensor:
            out_NHd = ragged_attention(
                q_NHd,
                k_NGd,
                v_NGd,
                *pools,
                entries.page_table_RP,
                entries.cu_query_R1,
                entries.context_R,
                self.page_size,
                config.scale,
                causal=True,
                window=config.windows[layer] if config.windows else 0,
            )
            if keep:
                store(k_NGd, v_NGd, *pools, entries.slot_T)
            return out_NHd

        rotary = self.rotary(entries.position_T, hidden_ND.dtype)
        return self.module(depth).join(self.embed(entries.token_T), hidden_ND, rotary, attend)

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        """Module k runs the entries of the last k committed positions: token k − 1 completes the newest of them."""
        position_R = context.position_R.clamp(min=1)  # an anchor without a past has no hidden state to start from
        token_RN, before_RND = context.anchor_R[:, None], None
        drawing = Drawing(context, self.signal)
        for depth in range(1, context.slots + 1):
            hidden_RND = self.last(depth, context.page_table_RP, position_R, before_RND)
            entries, there_RN = newest(depth, token_RN, position_R, context.page_table_RP, self.page_size)
            before_RND = torch.zeros_like(hidden_RND)
            before_RND[there_RN] = self.run(depth, entries, hidden_RND[there_RN], keep=False)
            logits_RV = self.slot_logits(self.module(depth).shared_head.norm(before_RND[:, -1]))
            token_RN = torch.cat((token_RN, drawing.draw(logits_RV)[:, None]), dim=1)
            if drawing.ended:
                break
        return drawing.draft()

    def last(self, depth: int, table_RP: Tensor, position_R: Tensor, before_RND: Tensor | None) -> Tensor:
        """The hidden states [R, depth, D] a module starts from: one that is committed, the others of this round."""
        oldest_R1 = (position_R - depth).clamp(min=0)[:, None]
        committed_R1D = self.hidden_KSD[depth - 1][slots_at(table_RP, oldest_R1, self.page_size)]
        return committed_R1D if before_RND is None else torch.cat((committed_R1D, before_RND), dim=1)


def completed(batch: Ragged, depth: int, page_size: int) -> Ragged:
    """The entries of module `depth` that a forward's rows complete: the token at position i completes entry i − depth.

    `slot_T` of the result is where each entry lies; requests may have none.
    """
    count_R = batch.cu_query_R1.diff()
    early_R = (depth - batch.context_R).clamp(min=0)  # rows at the start of a text that complete nothing
    row_T = torch.repeat_interleave(torch.arange(len(count_R), device=count_R.device), count_R)
    late_T = batch.position_T >= depth
    position_N, table_NP = batch.position_T[late_T] - depth, batch.page_table_RP[row_T[late_T]]
    return Ragged(
        token_T=batch.token_T[late_T],
        position_T=position_N,
        slot_T=slots_at(table_NP, position_N[:, None], page_size)[:, 0],
        page_table_RP=batch.page_table_RP,
        cu_query_R1=bounds((count_R - early_R).clamp(min=0)),
        context_R=(batch.context_R - depth).clamp(min=0),
    )


def newest(depth: int, token_RN: Tensor, position_R: Tensor, table_RP: Tensor, page_size: int) -> tuple[Ragged, Tensor]:
    """The last `depth` entries of every request with their tokens [R, depth], and which of them exist [R, depth]."""
    offset_N = torch.arange(depth, device=position_R.device)
    position_RN = position_R[:, None] - depth + offset_N
    there_RN = position_RN >= 0
    slot_RN = slots_at(table_RP, position_RN.clamp(min=0), page_size)
    entries = Ragged(
        token_T=token_RN[there_RN],
        position_T=position_RN[there_RN],
        slot_T=slot_RN[there_RN],
        page_table_RP=table_RP,
        cu_query_R1=bounds(there_RN.sum(1)),
        context_R=(position_R - depth).clamp(min=0).to(torch.int32),
    )
    return entries, there_RN


def bounds(count_R: Tensor) -> Tensor:
    """Where each request's rows begin, and the end, int32 [R + 1]."""
    return torch.nn.functional.pad(count_R.cumsum(0), (1, 0)).to(torch.int32)
