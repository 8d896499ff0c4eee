"""The one batch shape of this project: query tokens of several sequences, flattened, over paged keys and values.

T query tokens, R sequences, P pages per sequence at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Prefill is n query tokens, decode is 1, verification is 1+ℓ, a draft block is K: all rows of one batch.

    `token_T`, `position_T`, `slot_T` are int64; `page_table_RP`, `cu_query_R1`, `context_R` int32.
    `slot_T` says where each token's key and value live: page · page_size + offset.
    `context_R` counts the tokens of each sequence that are in the pages already, before its first query token.
    """

    token_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    page_table_RP: Tensor
    cu_query_R1: Tensor
    context_R: Tensor
