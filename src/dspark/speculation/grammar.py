"""Grammars along a round: which tokens each request's text allows before every drafted token and after the last.

The target's law and the drafter's are masked alike, so a structured text is verified like any other: p and q are the
laws of tokens that the grammar allows, before every other shaping.

R requests, C requests with a grammar, K draft slots, B target rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.drafters.base import Draft

CERTAIN = 0.9999  # confidence of the only token that a grammar leaves; a logit that calibrations can hold
Mask = npt.NDArray[np.bool_]


class Matcher(Protocol):
    """Where one text stands in its grammar.

    A matcher in `trouble` (its reason; the text is then not the grammar's) allows nothing but the end.
    """

    @property
    def trouble(self) -> str | None: ...

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        ...

    def allowed(self) -> Mask:
        """The tokens that may come next, bool [V]; never none. The end only where the text is one of the grammar's."""
        ...

    def advance(self, token: int) -> None:
        """Take a token; one that is not allowed is trouble."""
        ...

    def rollback(self, tokens: int) -> None:
        """Give back as many tokens, which were taken since the text was last committed."""
        ...


class Path:
    """One text's grammar followed along a round's draft."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.taken = 0
        self.ended: int | None = None  # how many drafted tokens it took to end the text
        self.lost = False  # a drafted token was not allowed: nothing behind it is ever looked at
        self._masks: list[Mask] = []

    def mask(self, depth: int) -> Mask | None:
        """What may follow the first `depth` drafted tokens; None where one of them was not allowed."""
        if depth == len(self._masks) and not self.lost:
            assert depth == self.taken, "a mask is made before the next token is taken"
            self._masks.append(self.matcher.allowed())
        return self._masks[depth] if depth < len(self._masks) else None

    def take(self, token: int) -> None:
        """Go on past one more drafted token."""
        mask = self.mask(self.taken)
        if mask is None or token >= len(mask) or not mask[token]:
            self.lost = True
            return
        self.matcher.advance(token)
        self.taken += 1
        if self.ended is None and self.matcher.complete:
            self.ended = self.taken

    def forced(self, depth: int) -> bool:
        """Whether the grammar leaves one token there; a function of the tokens before it."""
        mask = self.mask(depth)
        return mask is not None and np.count_nonzero(mask) == 1

    def rewind(self) -> None:
        """Back to the committed text."""
        self.matcher.rollback(self.taken)
        self.taken = 0


class Guide:
    """The grammars of a round's requests; those without one, by None, are left as they are. `rewind` ends the round."""

    def __init__(self, matchers: Sequence[Matcher | None]) -> None:
        self.paths = {r: Path(matcher) for r, matcher in enumerate(matchers) if matcher is not None}

    def draft_logits(self, logits_RV: Tensor, slot: int) -> Tensor:
        """The drafter's logits of slot `slot`, those of forbidden tokens at −inf; R may be the first requests only.

        A drafter may give no allowed token any weight, restricted as it can be to candidates or to a smaller
        vocabulary. All allowed ones then weigh the same, so the law that is drawn from is always one of theirs.
        """
        masks = {r: path.mask(slot) for r, path in self.paths.items() if r < len(logits_RV)}
        return _masked(logits_RV, masks, level=True)

    def take(self, token_R: Tensor) -> None:
        """The tokens drawn for the next slot; the one place where the host reads a draft while it is made."""
        for r, token in enumerate(token_R.tolist()):
            if r in self.paths:
                self.paths[r].take(token)

    def follow(self, draft: Draft) -> Draft:
        """The draft with what grammars know of it; also takes the tokens of drafters that do not draw by a sampler.

        A draft ends with its text. It is cut at a token that is not allowed if its law was certain of it: such a token
        was known before it was drawn, so cutting it is no peeking. Any other is verified, and rejected for p = 0. A
        token that was the only one allowed is sure to pass.
        """
        length_R, confidence_RK = list(draft.length_R), draft.confidence_RK.clone()
        for r, path in self.paths.items():
            if r >= len(length_R) or not length_R[r]:
                continue
            tokens = draft.token_RK[r, : length_R[r]].tolist()
            for slot in range(path.taken, length_R[r]):
                path.take(tokens[slot])
                if path.lost:
                    if float(draft.probability_RKV[r, slot, tokens[slot]]) == 1.0:
                        length_R[r] = slot
                    break
            if path.ended is not None:
                length_R[r] = min(length_R[r], path.ended)
            for slot in range(min(length_R[r], path.taken)):
                if path.forced(slot):
                    confidence_RK[r, slot] = CERTAIN
        return replace(draft, length_R=length_R, confidence_RK=confidence_RK)

    def target_logits(self, logits_BV: Tensor, plan: Sequence[int]) -> Tensor:
        """The target's logits, row k of request r after its first k drafted tokens, forbidden ones at −inf."""
        masks: dict[int, Mask | None] = {}
        start = 0
        for r, length in enumerate(plan):
            if r in self.paths:
                masks |= {start + k: self.paths[r].mask(k) for k in range(1 + length)}
            start += 1 + length
        return _masked(logits_BV, masks, level=False)

    def rewind(self) -> None:
        """Put every matcher back to its committed text."""
        for path in self.paths.values():
            path.rewind()


def _masked(logits_BV: Tensor, masks: Mapping[int, Mask | None], *, level: bool) -> Tensor:
    """Logits with −inf for what the rows' masks forbid; `level` makes the allowed tokens of a hopeless row equal."""
    known = {row: mask for row, mask in masks.items() if mask is not None}
    if not known:
        return logits_BV
    masks_CV = [*known.values()]
    allowed_CV = torch.from_numpy(masks_CV[0][None] if len(masks_CV) == 1 else np.stack(masks_CV))
    allowed_CV = allowed_CV.to(logits_BV.device)
    row_C = None if len(known) == logits_BV.shape[0] else torch.tensor([*known], device=logits_BV.device)
    own_CV = torch.where(allowed_CV, logits_BV if row_C is None else logits_BV[row_C], -torch.inf)
    if level and (own_CV.device.type != "cpu" or -math.inf in own_CV.amax(-1).tolist()):
        hopeless_C1 = own_CV.amax(-1, keepdim=True) == -torch.inf
        own_CV = own_CV.masked_fill(hopeless_C1 & allowed_CV, 0.0)
    return own_CV if row_C is None else logits_BV.index_copy(0, row_C, own_CV)
