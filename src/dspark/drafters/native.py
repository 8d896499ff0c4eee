"""The forwards of a block drafter by CPU kernels (ops/cpu/drafting.h), where its layers are plain ones.

R requests, K block inputs, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dspark.drafters.base import Draft, DraftContext
from dspark.models.compiled import Forward
from dspark.models.native import Binding, Stack
from dspark.ops.draws import Draws
from dspark.ops.linear import PackedLinear

if TYPE_CHECKING:
    from dspark.drafters.body import Body
    from dspark.drafters.heads import ConfidenceHead, VanillaMarkov

Rows = tuple[Tensor, Tensor, Tensor]
"""Taps, positions and slots of rows that the context has not taken yet."""


def stack_of(body: Body) -> Stack | None:
    """The backbone between embedding and LM head as the kernel's stack; None where it is not plain layers."""
    backbone, config = body.backbone, body.backbone.config
    family = config.family
    if family.sandwich or family.value_norm or config.key_is_value or family.scaled_embedding or config.logit_softcap:
        return None
    if config.hidden_act != "silu" or not _packed(backbone.fc):
        return None
    dtype = body.embed_tokens.weight.dtype

    def angles(position_P: Tensor) -> tuple[Tensor, Tensor]:
        cos_P1d, sin_P1d = backbone.rotary(position_P, dtype)
        return cos_P1d[:, 0], sin_P1d[:, 0]

    return Stack.of(
        list(backbone.layers),
        body.embed_tokens,
        backbone.norm,
        body.lm_head,
        angles,
        heads=config.num_attention_heads,
        windows=config.windows or [0] * config.num_hidden_layers,
        page_size=body.page_size,
        scale=config.scale,
    )


def native_block(body: Body) -> Forward | None:
    """`BlockForward` by the kernel."""
    stack, mask = stack_of(body), body.mask_token_id
    if stack is None:
        return None
    constants = Binding(stack)

    def forward(
        anchor_R: Tensor, position_R: Tensor, page_table_RP: Tensor, offset_K: Tensor, *pools: Tensor
    ) -> Sequence[Tensor]:
        block: Sequence[Tensor] = torch.ops.dspark.draft_block.default(
            anchor_R, position_R, page_table_RP, len(offset_K), mask, constants(pools[::2] + pools[1::2])
        )
        return block

    return forward


def native_context(body: Body) -> Forward | None:
    """`ContextForward` by the kernel."""
    stack, backbone = stack_of(body), body.backbone
    if stack is None:
        return None
    fc, norm_D, constants = backbone.fc.get_buffer("packed"), backbone.hidden_norm.weight, Binding(stack)

    def forward(taps_TD: Tensor, position_T: Tensor, slot_T: Tensor, *pools: Tensor) -> Sequence[Tensor]:
        torch.ops.dspark.draft_context.default(
            taps_TD, position_T, slot_T, fc, norm_D, constants(pools[::2] + pools[1::2])
        )
        return (slot_T + 1,)

    return forward


class NativeRound:
    """A whole round of DSpark in one kernel: pending rows into the context, a block, its tokens one by one."""

    def __init__(
        self, body: Body, stack: Stack, markov: VanillaMarkov, confidence: ConfidenceHead, packed_w2: Tensor
    ) -> None:
        backbone, rank = body.backbone, markov.markov_w1.weight.shape[1]
        seen, bias = confidence.proj.weight[0].float(), confidence.proj.bias.float()
        unseen = seen.new_zeros(0 if confidence.rank else rank)
        self.binding, self.mask = Binding(stack), body.mask_token_id
        self.pools = [*(key for key, _ in body.pools), *(value for _, value in body.pools)]
        self.context = (backbone.fc.get_buffer("packed"), backbone.hidden_norm.weight)
        self.head = (markov.markov_w1.weight, packed_w2)
        self.seen = torch.cat((seen, unseen, bias))

    def __call__(self, pending: Rows | tuple[()], context: DraftContext, draws: Draws) -> Draft:
        """What `extend` of the pending rows and then `propose` do."""
        token_RK, law_RKV, confidence_RK = torch.ops.dspark.draft_round.default(
            pending,
            *self.context,
            context.anchor_R,
            context.position_R,
            context.page_table_RP,
            self.mask,
            *self.head,
            draws.knobs_R4,
            draws.uniform_RK,
            draws.key_RK,
            self.seen,
            self.binding(self.pools),
        )
        return Draft(token_RK, law_RKV, confidence_RK, [context.slots] * len(context.request_ids))


def _packed(linear: nn.Module) -> bool:
    return isinstance(linear, PackedLinear) and linear.bias is None
