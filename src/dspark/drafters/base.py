"""What every drafter is: something that extends its context with the target's rows and proposes a block of new ones.

R drafting requests, K block slots, V vocabulary, T tokens, D hidden size, k taps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.pages import KVPool
from dspark.ops.draws import Draws


class TokenSampler(Protocol):
    """Turns a drafter's logits for one block slot into a token, as each request's sampling parameters say."""

    def draw(self, logits_RV: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Draw slot `slot` (0-based) of every request: (token_R, the law probability_RV it came from)."""
        ...


class Rules(Protocol):
    """What may be drawn where requests have a grammar; slots in order, each asked for and then told."""

    def draft_logits(self, logits_RV: Tensor, slot: int) -> Tensor:
        """The logits of a slot with those of forbidden tokens at −inf."""
        ...

    def take(self, token_R: Tensor) -> None:
        """The tokens drawn for it."""
        ...


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at: committed tokens and the pages that hold their context; never the future."""

    anchor_R: Tensor  # int64, last committed token of each request; its key/value is not in the pages yet
    position_R: Tensor  # int64, the anchor's absolute position = tokens of the request that are in the pages
    page_table_RP: Tensor  # int32
    slots: int  # K: how many tokens to propose, 1..block_size
    request_ids: Sequence[int]
    history: Sequence[Sequence[int]]  # committed token ids of each request, anchor last
    sampler: TokenSampler
    draws: Draws | None = None  # how `sampler` draws, for a drafter that draws by itself; `rules` come on top
    rules: Rules | None = None  # which `sampler` keeps; a drafter that draws by itself has to
    wanted: bool = True  # whether anyone reads the confidences; a drafter may save what only they need
    going_on: GoingOn | None = None  # asked between two slots by drafters to which a slot is a forward of its own


GoingOn = Callable[[Tensor], bool]
"""Gets confidence_R of the slot just drawn and says whether to draft the next one; asked once a slot, in order.

The answer depends on the tokens before that slot and on older things, so that a block may end where it says.
"""


@dataclass(frozen=True)
class Draft:
    """Proposed blocks. `probability_RKV[r, k]` is exactly the distribution token_RK[r, k] was drawn from."""

    token_RK: Tensor  # int64
    probability_RKV: Tensor  # float32
    confidence_RK: Tensor  # float32, estimate of P(accept k | prefix accepted); may depend on tokens before k only
    length_R: Sequence[int]  # how many slots each request really proposes (n-gram lookup may find fewer than K)
    feature_RKF: Tensor | None = None  # what the confidences were made of, by a drafter without a head: `signal.py`


class Drafter(Protocol):
    """One drafter serves all requests of an engine; its context lives in pools parallel to the target's pages.

    A drafter's context is addressed by the same page table and slots as the target's keys and values, so prefix
    sharing, rollback and release of pages carry the drafter's context with them and need no call of their own.
    """

    block_size: int  # γ, the most tokens it can propose
    taps: tuple[int, ...]  # target layers whose outputs `extend` wants; () for none

    def allocate(self, pages: int, page_size: int) -> None:
        """Make the context pools for a target pool of this size."""
        ...

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        """Start compiling what pays, after `allocate`; returns the graphs, none where there is nothing to compile."""
        ...

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        """Take a target forward's rows into the context: `taps_TD` is the taps' hidden states, concatenated (k·D wide).

        Rows of rejected drafts come along: like the target's own keys they lie past the committed text, where the
        next rows overwrite them before anything reads them. A drafter whose class says `rows_apart = True` takes each
        row for itself, by `position_T` and `slot_T` alone, so that rows of several steps may come together, later.
        """
        ...

    def propose(self, context: DraftContext) -> Draft:
        """Draft `context.slots` tokens after each anchor, or fewer where `context.going_on` ends the block."""
        ...


@runtime_checkable
class SharesPages(Protocol):
    """A drafter whose keys and values of committed tokens are the target's own, in the target's pool."""

    def share(self, pool: KVPool) -> None:
        """Called in place of `allocate`: read the target's pages, and write past the committed text alone."""
        ...
