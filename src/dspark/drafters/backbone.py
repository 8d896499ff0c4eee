"""The parallel drafting backbone of DFlash and DSpark: one pass over a block, attending to the target's hidden states.

T tokens, R requests, B rows, S row length or pool slots, A anchors, K block slots, D hidden size, k taps,
G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dspark.drafters.layers import BackboneConfig, Layer, RMSNorm, RotaryEmbedding
from dspark.drafters.lesson import Lesson
from dspark.ops.attention import ragged_attention
from dspark.ops.block_attention import Layout, block_attention

Pools = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of the context, for every layer: two pools [S, G, d]."""


class Backbone(nn.Module):
    """Keys and values are [context; block], queries come from the block alone, the block sees itself both ways.

    The context of a token is `hidden_norm(fc(taps))`; its keys and values are projected once, when it is committed.
    (DFlash, §3; DSpark, §3.1)
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.tap_count * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def allocate(self, slots: int) -> Pools:
        """Empty context pools of `slots` tokens, on the weights' device and in their dtype."""
        shape = (slots, self.config.num_key_value_heads, self.config.head_dim)
        like = self.hidden_norm.weight  # never packed, unlike the matrices
        return tuple((like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers)

    def project(self, taps: Tensor, position: Tensor) -> Pools:
        """Context keys and values [..., G, d] of every layer, from taps [..., k·D] at absolute positions [...]."""
        context = self.hidden_norm(self.fc(taps.to(self.hidden_norm.weight.dtype)))
        rotary = self.rotary(position, context.dtype)
        return tuple(cast(Layer, layer).self_attn.key_value(context, rotary) for layer in self.layers)

    def forward(
        self,
        inputs_TD: Tensor,
        position_T: Tensor,
        pools: Pools,
        page_table_RP: Tensor,
        cu_query_R1: Tensor,
        context_R: Tensor,
        page_size: int,
    ) -> Tensor:
        """Hidden states [T, D] after the last norm, of R blocks laid out as one ragged batch over paged context."""
        config = self.config

        def attend(layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
            return ragged_attention(
                q_THd,
                k_TGd,
                v_TGd,
                *pools[layer],
                page_table_RP,
                cu_query_R1,
                context_R,
                page_size,
                config.scale,
                causal=False,
                window=config.windows[layer] if config.windows else 0,
            )

        x_TD, rotary = inputs_TD, self.rotary(position_T, inputs_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD, rotary, attend)
        return self.norm(x_TD)

    def blocks(self, inputs_BAKD: Tensor, lesson: Lesson) -> Tensor:
        """Hidden states [B, A, K, D] of many blocks a row at once, for training: each sees its document before it."""
        config, slots = self.config, inputs_BAKD.shape[2]
        context = self.project(lesson.taps_BSD, lesson.position_BS)
        layout = Layout(lesson.anchor_BA, lesson.start_BA, slots, lesson.token_BS.shape[1])

        def attend(layer: int, q_BAKHd: Tensor, k_BAKGd: Tensor, v_BAKGd: Tensor) -> Tensor:
            window = config.windows[layer] if config.windows else 0
            return block_attention(q_BAKHd, k_BAKGd, v_BAKGd, *context[layer], layout, config.scale, window=window)

        position_BAK = lesson.anchor_position_BA[..., None] + torch.arange(slots, device=lesson.anchor_BA.device)
        x_BAKD, rotary = inputs_BAKD, self.rotary(position_BAK, inputs_BAKD.dtype)
        for layer in self.layers:
            x_BAKD = layer(x_BAKD, rotary, attend)
        return self.norm(x_BAKD)
