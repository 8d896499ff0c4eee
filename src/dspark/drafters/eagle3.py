"""Eagle-3: an autoregressive one-layer drafter over [token embedding; target features], the field's baseline.

Entry t of its context joins the feature of position t with token t+1, so it exists only once token t+1 is committed.
B sequences, S tokens, T ragged tokens, R requests, K block slots, V vocabulary,
U pruned vocabulary, D hidden size, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext
from dspark.drafters.body import softcapped
from dspark.drafters.drawing import Drawing
from dspark.drafters.layers import Attend, BackboneConfig, Layer, RMSNorm, Rotary, RotaryEmbedding
from dspark.drafters.lesson import Blocks, Lesson, following, later, rows_at
from dspark.drafters.pruned import kept, offsets, widened
from dspark.drafters.signal import LARGEST, Signal
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.pages import SCRATCH_PAGE, slots_at
from dspark.ops.attention import ragged_attention, store
from dspark.ops.step_attention import step_attention
from dspark.ops.tail_attention import tail_attention


class EagleLayer(Layer):
    """The family's layer whose attention reads [norm(embedding); norm(hidden)]; the residual is the hidden state."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config, 0, width=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def joined(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """What queries, keys and values are projected from, [..., 2·D]."""
        return torch.cat((self.input_layernorm(embedding), self.hidden_norm(hidden)), dim=-1)

    def step(self, embedding: Tensor, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """The next hidden states [..., D]."""
        both = self.joined(embedding, hidden)
        mixed = attend(0, self.self_attn.query(both, rotary), *self.self_attn.key_value(both, rotary))
        return self.finish(hidden, mixed)


class Chain(NamedTuple):
    """A drafted chain: hidden_BK1D (the state each step starts from, and the last), logits_BKV, token_BK."""

    hidden: Tensor
    logits: Tensor
    token: Tensor


class Eagle3(nn.Module):
    """One layer, `fc` over the taps, `norm` before the LM head.

    In the engine the keys and values of entry t lie at position t's slot. Features are kept by slot too, for the entry
    of the newest token waits for the token after it: `extend` and `propose` write entry p − 1 when they see token p.
    """

    every_position = False
    signal: Signal = LARGEST
    d2t: Tensor
    t2d: Tensor
    feature_SD: Tensor
    pools: tuple[Tensor, Tensor]
    page_size: int

    def __init__(
        self,
        config: BackboneConfig,
        embed_tokens: nn.Embedding,
        lm_head: nn.Module,
        *,
        taps: tuple[int, ...],
        block_size: int,
        draft_vocabulary: int = 0,
    ) -> None:
        """`draft_vocabulary` > 0: `lm_head` is the drafter's own, over so many tokens, which `d2t` and `t2d` name."""
        super().__init__()
        self.config = config
        self.taps = taps
        self.block_size = block_size
        self.embed_tokens = embed_tokens.requires_grad_(False)
        self.lm_head = lm_head.requires_grad_(draft_vocabulary > 0)
        self.fc = nn.Linear(config.tap_count * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([EagleLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.window = config.windows[0] if config.windows else 0
        self.pruned = draft_vocabulary > 0
        if self.pruned:
            self.register_buffer("d2t", torch.zeros(draft_vocabulary, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(embed_tokens.num_embeddings, dtype=torch.bool))

    def adopt(self, kept_U: Tensor) -> Tensor:
        """Draft from the target's tokens `kept_U` (ascending); returns them."""
        self.d2t.copy_(offsets(kept_U))
        self.t2d.zero_()[kept_U] = True
        return kept_U

    @property
    def layer(self) -> EagleLayer:
        return cast(EagleLayer, self.layers[0])

    def embed(self, token: Tensor) -> Tensor:
        return self.embed_tokens(token) * self.config.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the layer's hidden states [..., D]; −inf for what the draft vocabulary lacks."""
        drafted = self.slot_logits(self.norm(hidden), None)
        return widened(drafted, kept(self.d2t), len(self.t2d)) if self.pruned else drafted

    def run(
        self, token_BS: Tensor, hidden_BSD: Tensor, start: int, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One causal pass at positions start.. over dense keys and values of what came before; (hidden, past)."""
        position_S = torch.arange(start, start + token_BS.shape[1], device=token_BS.device)

        def attend(_layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
            past.append((k_BSGd, v_BSGd))
            keys, values = (torch.cat(parts, dim=1) for parts in zip(*past, strict=True))
            return step_attention(q_BSHd, keys, values, self.config.scale)

        rotary = self.rotary(position_S, hidden_BSD.dtype)
        return self.layer.step(self.embed(token_BS), hidden_BSD, rotary, attend), past

    @torch.no_grad()
    def chain(self, taps_BSkD: Tensor, next_token_BS: Tensor, steps: int) -> Chain:
        """Draft `steps` tokens greedily after a prefix; next_token_BS is token t+1 beside the taps of token t."""
        hidden_BSD, past = self.run(next_token_BS, self.fc(taps_BSkD), 0, [])
        hidden_B1D, position = hidden_BSD[:, -1:], next_token_BS.shape[1]
        hiddens, logits, tokens = [hidden_B1D], [], []
        for _ in range(steps):
            logits_B1V = self.logits(hidden_B1D)
            token_B1 = logits_B1V.argmax(-1)
            hidden_B1D, past = self.run(token_B1, hidden_B1D, position, past)
            position += 1
            hiddens.append(hidden_B1D)
            logits.append(logits_B1V)
            tokens.append(token_B1)
        return Chain(torch.cat(hiddens, 1), torch.cat(logits, 1), torch.cat(tokens, 1))

    @property
    def lesson_slots(self) -> int:
        return self.block_size

    @property
    def draft_ids(self) -> Tensor | None:
        return kept(self.d2t) if self.pruned else None

    def forward(self, lesson: Lesson) -> Blocks:
        """The training-time test: step k reads the hidden states of step k − 1 beside the true token (EAGLE-3, §3.2).

        Every place sees the entries of its document that real features made, and those of its own chain.
        """
        entry_BA, start_BA = lesson.before_BA, lesson.start_BA
        feature_BSD = self.fc(lesson.taps_BSD.to(self.fc.weight.dtype))
        both_BSD = self.layer.joined(self.embed(later(lesson.token_BS, 1)), feature_BSD)
        rotary = self.rotary(lesson.position_BS, both_BSD.dtype)
        context = self.layer.self_attn.key_value(both_BSD, rotary)
        tail_k, tail_v = list[Tensor](), list[Tensor]()

        def attend(_layer: int, q_BAHd: Tensor, k_BAGd: Tensor, v_BAGd: Tensor) -> Tensor:
            if hidden_BAKD:  # the first step's own entry lies in the context
                tail_k.append(k_BAGd)
                tail_v.append(v_BAGd)
            keys, values = (
                torch.stack(tail, 2) if tail else x[:, :, None][:, :, :0]
                for tail, x in ((tail_k, k_BAGd), (tail_v, v_BAGd))
            )
            past = (*context, keys, values, entry_BA, start_BA)
            return tail_attention(q_BAHd, *past, self.config.scale, window=self.window)

        token_BAK = following(lesson.token_BS, lesson.anchor_BA, self.block_size)
        state_BAD, hidden_BAKD = rows_at(feature_BSD, entry_BA), list[Tensor]()
        for step in range(self.block_size):
            rotary = self.rotary(entry_BA - start_BA + step, state_BAD.dtype)
            state_BAD = self.layer.step(self.embed(token_BAK[..., step]), state_BAD, rotary, attend)
            hidden_BAKD.append(self.norm(state_BAD) * lesson.begun_BA1)
        return Blocks(torch.stack(hidden_BAKD, dim=2), None, None)

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        return softcapped(self.lm_head(hidden_ND), self.config.logit_softcap)

    def allocate(self, pages: int, page_size: int) -> None:
        """Pools of features, keys and values, addressed by the target's page table."""
        self.page_size, slots, like = page_size, pages * page_size, self.norm.weight
        shape = (slots, self.config.num_key_value_heads, self.config.head_dim)
        self.feature_SD = like.new_zeros(slots, self.config.hidden_size)
        self.pools = (like.new_zeros(shape), like.new_zeros(shape))

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Nothing is compiled yet."""
        return ()

    @torch.inference_mode()
    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Keep the features of a forward's rows, and write the entries that their arrival completes."""
        assert taps_TD is not None, "Eagle-3 reads the target's hidden states"
        self.feature_SD[batch.slot_T] = self.fc(taps_TD.to(self.feature_SD.dtype))
        count_R = batch.cu_query_R1.diff()
        request_T = torch.repeat_interleave(torch.arange(len(count_R), device=count_R.device), count_R)
        later = batch.position_T > 0  # token 0 completes no entry
        position_T, token_T, request_T = batch.position_T[later] - 1, batch.token_T[later], request_T[later]
        slot_T = self.slots(batch.page_table_RP[request_T], position_T)
        both = self.layer.joined(self.embed(token_T), self.feature_SD[slot_T])
        store(*self.layer.self_attn.key_value(both, self.rotary(position_T, both.dtype)), *self.pools, slot_T)

    def slots(self, table_TP: Tensor, position_T: Tensor) -> Tensor:
        """The slot of one position in each row of a page table."""
        return slots_at(table_TP, position_T[:, None], self.page_size)[:, 0]

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        """K one-token steps; step k's entry is at anchor + k − 1, on the scratch page past the end of a request's."""
        spare = -(-context.slots // self.page_size)
        table_RP = torch.nn.functional.pad(context.page_table_RP, (0, spare), value=SCRATCH_PAGE)
        token_R, position_R = context.anchor_R, (context.position_R - 1).clamp(min=0)
        hidden_RD = self.feature_SD[self.slots(table_RP, position_R)]
        drawing = Drawing(context, self.signal)
        for slot in range(context.slots):
            hidden_RD = self.step(token_R, hidden_RD, position_R + slot, table_RP)
            token_R = drawing.draw(self.logits(hidden_RD))
            if drawing.ended:
                break
        return drawing.draft()

    def step(self, token_R: Tensor, hidden_RD: Tensor, position_R: Tensor, table_RP: Tensor) -> Tensor:
        """One entry a request: its keys and values are stored, its hidden state [R, D] returned."""
        cu_query_R1 = torch.arange(len(token_R) + 1, dtype=torch.int32, device=token_R.device)

        def attend(_layer: int, q_RHd: Tensor, k_RGd: Tensor, v_RGd: Tensor) -> Tensor:
            out_RHd = ragged_attention(
                q_RHd,
                k_RGd,
                v_RGd,
                *self.pools,
                table_RP,
                cu_query_R1,
                position_R.to(torch.int32),
                self.page_size,
                self.config.scale,
                causal=True,
                window=self.window,
            )
            store(k_RGd, v_RGd, *self.pools, self.slots(table_RP, position_R))
            return out_RHd

        rotary = self.rotary(position_R, hidden_RD.dtype)
        return self.layer.step(self.embed(token_R), hidden_RD, rotary, attend)
