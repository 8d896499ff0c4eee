"""The forwards of a block drafter by CPU kernels (ops/cpu/drafting.h), where its layers are plain ones.

R requests, K block inputs, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dspark.models.compiled import Forward
from dspark.models.native import Stack
from dspark.ops.linear import PackedLinear

if TYPE_CHECKING:
    from dspark.drafters.body import Body


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

    def forward(
        anchor_R: Tensor, position_R: Tensor, page_table_RP: Tensor, offset_K: Tensor, *pools: Tensor
    ) -> Sequence[Tensor]:
        block: Sequence[Tensor] = torch.ops.dspark.draft_block.default(
            anchor_R,
            position_R,
            page_table_RP,
            len(offset_K),
            mask,
            pools[::2] + pools[1::2],
            stack.parts,
            stack.shared(len(pools[0])),
            stack.sizes,
            stack.numbers,
        )
        return block

    return forward


def native_context(body: Body) -> Forward | None:
    """`ContextForward` by the kernel."""
    stack, backbone = stack_of(body), body.backbone
    if stack is None:
        return None
    fc, norm_D = backbone.fc.get_buffer("packed"), backbone.hidden_norm.weight

    def forward(taps_TD: Tensor, position_T: Tensor, slot_T: Tensor, *pools: Tensor) -> Sequence[Tensor]:
        embedding, _, head, cos, sin = stack.shared(len(pools[0]))
        torch.ops.dspark.draft_context.default(
            taps_TD,
            position_T,
            slot_T,
            fc,
            pools[::2] + pools[1::2],
            stack.parts,
            (embedding, norm_D, head, cos, sin),
            stack.sizes,
            stack.numbers,
        )
        return (slot_T + 1,)

    return forward


def _packed(linear: nn.Module) -> bool:
    return isinstance(linear, PackedLinear) and linear.bias is None
