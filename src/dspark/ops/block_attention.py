"""Attention of many draft blocks over the rows they were cut from, for training.

Queries are the blocks' slots, keys the row's context followed by all slots; one rule says which key a query sees.
On the CPU blocks are taken in tiles that read no more context than their last anchor, through torch's fused attention;
on CUDA FlexAttention skips what the rule hides. B rows, S context tokens, A anchors, K block slots, Q = A·K queries,
L keys, H heads, G key/value heads, n = H / G, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

TILE = 32  # blocks of a tile: fewer cost calls, more cost products with other blocks' slots

Rule = Callable[[Any, Any, Any], Tensor]
"""(row, query, key) → whether the query sees the key; broadcasts."""


class Tile(NamedTuple):
    """Blocks [first, last) of a row and the context [low, high) that any of them sees."""

    row: int
    first: int
    last: int
    low: int
    high: int


class Layout:
    """Where blocks stand and what they see; made once for a batch, used by every layer."""

    def __init__(self, anchor_BA: Tensor, start_BA: Tensor, slots: int, context: int) -> None:
        self.anchor_BA, self.start_BA, self.slots, self.context = anchor_BA, start_BA, slots, context
        self._masks: dict[tuple[Any, ...], Any] = {}

    def rule(self, window: int) -> Rule:
        """Block a sees its own K slots, both ways, and the context in [start, anchor) (DFlash, §3).

        With a `window`, slot k sees context newer than anchor + k − window.
        """
        slots, context = self.slots, self.context

        def sees(row: Any, query: Any, key: Any) -> Tensor:
            block = query // slots
            anchor = self.anchor_BA[row, block]
            far = (key >= self.start_BA[row, block]) & (key < anchor)
            if window:
                far = far & (key > anchor + query % slots - window)
            return far | ((key >= context) & ((key - context) // slots == block))

        return sees

    def tiles(self) -> list[Tile]:
        """All blocks of all rows, TILE at a time."""
        rows = zip(self.anchor_BA.split(TILE, 1), self.start_BA.split(TILE, 1), strict=True)
        bounds = [(start_BA.amin(1).tolist(), anchor_BA.amax(1).tolist()) for anchor_BA, start_BA in rows]
        rows_count, blocks = self.anchor_BA.shape
        return [
            Tile(row, i * TILE, min((i + 1) * TILE, blocks), min(low[row], high[row]), high[row])
            for row in range(rows_count)
            for i, (low, high) in enumerate(bounds)
        ]

    def tile_mask(self, tile: Tile, window: int, dtype: torch.dtype) -> Tensor:
        """0 or −inf for each query of a tile and each of its keys, [Q, L]."""
        name = (tile, window, dtype)
        if name not in self._masks:
            K, device = self.slots, self.anchor_BA.device
            query_Q = torch.arange(tile.first * K, tile.last * K, device=device)
            key_L = torch.cat((torch.arange(tile.low, tile.high, device=device), query_Q + self.context))
            seen_QL = self.rule(window)(tile.row, query_Q[:, None], key_L)
            self._masks[name] = torch.zeros(seen_QL.shape, dtype=dtype, device=device).masked_fill(
                ~seen_QL, float("-inf")
            )
        return self._masks[name]

    def block_mask(self, window: int) -> Any:
        """FlexAttention's list of which parts of the scores are wanted."""
        name = ("flex", window)
        if name not in self._masks:
            sees = self.rule(window)
            rows, blocks = self.anchor_BA.shape
            queries = blocks * self.slots
            self._masks[name] = create_block_mask(
                lambda b, _h, q, kv: sees(b, q, kv),
                rows,
                None,
                queries,
                self.context + queries,
                device=self.anchor_BA.device,
                _compile=self.anchor_BA.is_cuda,
            )
        return self._masks[name]


def block_attention(
    q_BAKHd: Tensor,
    k_BAKGd: Tensor,
    v_BAKGd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    layout: Layout,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """Attention by the layout's rule, [B, A, K, H, d]."""
    attend = flex_block_attention if q_BAKHd.is_cuda else tiled_block_attention
    return attend(q_BAKHd, k_BAKGd, v_BAKGd, context_k_BSGd, context_v_BSGd, layout, scale, window=window)


def plain_block_attention(
    q_BAKHd: Tensor,
    k_BAKGd: Tensor,
    v_BAKGd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    layout: Layout,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """The specification: every score, then what the rule hides is −inf."""
    B, A, K, H, d = q_BAKHd.shape
    keys_BLGd = torch.cat((context_k_BSGd, k_BAKGd.flatten(1, 2)), 1)
    values_BLGd = torch.cat((context_v_BSGd, v_BAKGd.flatten(1, 2)), 1)
    n, L = H // keys_BLGd.shape[2], keys_BLGd.shape[1]
    keys_BHLd, values_BHLd = (x.repeat_interleave(n, 2).transpose(1, 2) for x in (keys_BLGd, values_BLGd))
    scores_BHQL = q_BAKHd.flatten(1, 2).transpose(1, 2) @ keys_BHLd.mT * scale
    row_B, query_Q, key_L = (torch.arange(size, device=q_BAKHd.device) for size in (B, A * K, L))
    seen_BQL = layout.rule(window)(row_B[:, None, None], query_Q[:, None], key_L)
    out_BHQd = scores_BHQL.masked_fill(~seen_BQL[:, None], float("-inf")).softmax(-1) @ values_BHLd
    return out_BHQd.transpose(1, 2).reshape(B, A, K, H, d)


def tiled_block_attention(
    q_BAKHd: Tensor,
    k_BAKGd: Tensor,
    v_BAKGd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    layout: Layout,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """Tile by tile: the context before a tile's last anchor, and the tile's own slots."""
    B, A, K, H, d = q_BAKHd.shape
    G = k_BAKGd.shape[3]
    q_BGnQd = q_BAKHd.view(B, A * K, G, H // G, d).permute(0, 2, 3, 1, 4)
    k_BGQd, v_BGQd = (x.flatten(1, 2).transpose(1, 2) for x in (k_BAKGd, v_BAKGd))
    context_k_BGSd, context_v_BGSd = (x.transpose(1, 2) for x in (context_k_BSGd, context_v_BSGd))
    kind, outs = working_dtype(q_BAKHd), []
    for tile in layout.tiles():
        row, own, far = tile.row, slice(tile.first * K, tile.last * K), slice(tile.low, tile.high)
        keys_GnLd, values_GnLd = (
            torch.cat((context_BGSd[row, :, far], own_BGQd[row, :, own]), 1)[:, None].expand(-1, H // G, -1, -1)
            for context_BGSd, own_BGQd in ((context_k_BGSd, k_BGQd), (context_v_BGSd, v_BGQd))
        )
        mask_QL = layout.tile_mask(tile, window, kind)
        query_GnQd = q_BGnQd[row, :, :, own]
        out_GnQd = scaled_dot_product_attention(query_GnQd, keys_GnLd, values_GnLd, mask_QL, scale=scale)
        outs.append(out_GnQd.permute(2, 0, 1, 3))
    return torch.cat(outs).view(B, A, K, H, d)


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where it is on, else the tensor's own."""
    place = x.device.type
    return torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else x.dtype


@cache
def compiled_flex() -> Any:
    """FlexAttention as one kernel; without compilation it would make every score."""
    return torch.compile(flex_attention)


def flex_block_attention(
    q_BAKHd: Tensor,
    k_BAKGd: Tensor,
    v_BAKGd: Tensor,
    context_k_BSGd: Tensor,
    context_v_BSGd: Tensor,
    layout: Layout,
    scale: float,
    *,
    window: int = 0,
) -> Tensor:
    """One call for all rows and blocks."""
    B, A, K, H, d = q_BAKHd.shape
    kind = working_dtype(q_BAKHd)
    keys_BGLd, values_BGLd = (
        torch.cat((context, own.flatten(1, 2)), 1).transpose(1, 2).to(kind)
        for context, own in ((context_k_BSGd, k_BAKGd), (context_v_BSGd, v_BAKGd))
    )
    flex = compiled_flex() if q_BAKHd.is_cuda else flex_attention
    q_BHQd, mask = q_BAKHd.flatten(1, 2).transpose(1, 2).to(kind), layout.block_mask(window)
    gqa = k_BAKGd.shape[3] != H
    out_BHQd = flex(q_BHQd, keys_BGLd, values_BGLd, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out_BHQd.transpose(1, 2).reshape(B, A, K, H, d)
