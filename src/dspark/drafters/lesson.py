"""What a drafter is trained on, and what it answers: hidden rows, not logits, so that the loss can walk in chunks.

B rows of packed documents, S tokens, A anchors, K block slots, N rows of a chunk, V draft vocabulary, D hidden size,
k taps, r rank of what the head reads beside the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Lesson(NamedTuple):
    """Rows of documents with the target's hidden states, and where to draft from."""

    token_BS: Tensor  # int64
    taps_BSD: Tensor  # [B, S, k·D], the taps' hidden states side by side
    start_BS: Tensor  # int64, the index in its row where the document of each position begins
    anchor_BA: Tensor  # int64, indices in the row; block a may see positions of its own document before its anchor

    @staticmethod
    def of(token_BS: Tensor, taps_BSD: Tensor, anchor_BA: Tensor) -> Lesson:
        """Rows of one document each."""
        return Lesson(token_BS, taps_BSD, torch.zeros_like(token_BS), anchor_BA)

    @property
    def position_BS(self) -> Tensor:
        """Positions restart with every document: what rotary embeddings see."""
        return torch.arange(self.token_BS.shape[1], device=self.token_BS.device) - self.start_BS

    @property
    def start_BA(self) -> Tensor:
        """Where the document of each anchor begins."""
        return self.start_BS.gather(1, self.anchor_BA)

    @property
    def anchor_position_BA(self) -> Tensor:
        """The anchors' positions in their own documents."""
        return self.anchor_BA - self.start_BA

    @property
    def before_BA(self) -> Tensor:
        """The position before each anchor, the newest whose hidden state exists; the anchor where there is none."""
        return torch.maximum(self.anchor_BA - 1, self.start_BA)

    @property
    def begun_BA1(self) -> Tensor:
        """Whether anything precedes the anchor in its document, [B, A, 1]."""
        return (self.anchor_BA > self.start_BA)[..., None]


class Blocks(NamedTuple):
    """Slot k of block a drafts the token at anchor + k + 1. `slot_logits(hidden, latent)` are its logits."""

    hidden_BAKD: Tensor
    latent_BAKr: Tensor | None  # what a sequential head adds its bias from
    confidence_BAK: Tensor | None  # logits


class Trainable(Protocol):
    """A drafter as training sees it; a torch module whose frozen tensors do not require gradients."""

    taps: tuple[int, ...]
    every_position: bool  # drafts from every supervised position instead of sampled anchors

    @property
    def lesson_slots(self) -> int:
        """K: how many slots a block has in training."""
        ...

    @property
    def draft_ids(self) -> Tensor | None:
        """Target id of each token of a pruned draft vocabulary [V]; None where it is the target's own."""
        ...

    def __call__(self, lesson: Lesson) -> Blocks:
        """Every block of every row; the tokens before a slot are the true ones (teacher forcing)."""
        ...

    def slot_logits(self, hidden_ND: Tensor, latent_Nr: Tensor | None) -> Tensor:
        """Draft logits [N, V] of any choice of slots."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def following(token_BS: Tensor, anchor_BA: Tensor, slots: int, shift: int = 0) -> Tensor:
    """[B, A, K] values of token_BS at anchor + shift + k; past the end the last one, which no label reads."""
    offset = torch.arange(slots, device=token_BS.device) + shift
    index = (anchor_BA[..., None] + offset).clamp(max=token_BS.shape[1] - 1)
    return token_BS.gather(1, index.flatten(1)).view(index.shape)


def later(token_BS: Tensor, shift: int) -> Tensor:
    """[B, S] the tokens `shift` places on; past the end the last one."""
    order_S = torch.arange(token_BS.shape[1], device=token_BS.device) + shift
    return token_BS[:, order_S.clamp(max=token_BS.shape[1] - 1)]


def rows_at(x_BSD: Tensor, place_BA: Tensor) -> Tensor:
    """[B, A, D] the rows of x_BSD at given places."""
    return x_BSD.gather(1, place_BA[..., None].expand(-1, -1, x_BSD.shape[-1]))
