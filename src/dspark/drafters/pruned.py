"""A draft vocabulary: the target's most frequent tokens, over which a drafter's own small LM head works.

`d2t` [U] int64 is what to add to a draft id for the target's id, `t2d` [V] bool whether a token can be drafted (the
speculators format). R requests, V the target's vocabulary, U the draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_frequent(count_V: Tensor, size: int) -> Tensor:
    """The ids [U] of the `size` most frequent tokens, ascending; the smaller id where counts are equal."""
    return count_V.argsort(descending=True, stable=True)[:size].sort().values


def offsets(kept_U: Tensor) -> Tensor:
    """d2t of the kept ids."""
    return kept_U - torch.arange(len(kept_U), device=kept_U.device)


def whole_vocabulary(size: int) -> dict[str, Tensor]:
    """The maps of a drafter whose own LM head covers every token of the target's."""
    return {"d2t": torch.zeros(size, dtype=torch.long), "t2d": torch.ones(size, dtype=torch.bool)}


def kept(d2t_U: Tensor) -> Tensor:
    """The target's ids [U] behind the draft ids."""
    return d2t_U + torch.arange(len(d2t_U), device=d2t_U.device)


def widened(logits_RU: Tensor, kept_U: Tensor, vocabulary: int) -> Tensor:
    """Logits [R, V] that are −inf at every token outside the draft vocabulary."""
    empty_RV = logits_RU.new_full((*logits_RU.shape[:-1], vocabulary), float("-inf"))
    return empty_RV.index_copy(-1, kept_U, logits_RU)
