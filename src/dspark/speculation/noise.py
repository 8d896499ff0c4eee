"""All the randomness of one speculative round, fixed before any draft token exists.

R requests, K draft slots, V vocabulary, C coupled requests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.common.rng import ACCEPT, DRAFT, RESIDUAL
from dspark.ops.races import exponentials, race_keys
from dspark.ops.rows import argmax
from dspark.ops.sampling import draw, race
from dspark.ops.uniforms import uniforms

MAX_SLOTS = 1 << 12  # the slot's share of a counter


@dataclass
class RoundNoise:
    """The noise of one round of R requests; make a new one for every round.

    Rejection-rule numbers are keyed by (seed, counter, slot): the counter must grow with every round of a request, so
    that a position drafted again meets fresh numbers. Coupled-rule noise is keyed by (seed, output position) alone.
    """

    draft_RK: Tensor  # float64 uniforms in (0, 1)
    accept_RK: Tensor
    final_R: Tensor
    coupled: Sequence[int]  # the requests under the coupled rule whose law is not a one-hot
    seeds: Sequence[int]
    positions: Sequence[int]  # output position (0 for the first generated token) that each request's row 0 decides
    still: bool = False  # every request is at temperature 0: no number here can matter
    _key_RK1: Tensor | None = field(default=None, repr=False)
    _exponential_CKV: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        seeds: Sequence[int],
        counters: Sequence[int],
        positions: Sequence[int],
        coupled: Sequence[bool],
        *,
        slots: int,
        greedy: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> RoundNoise:
        """Noise for `slots` draft slots per request; `greedy` marks requests at temperature 0 (default: none).

        Under a one-hot law both rules commit the same token whatever the noise, so a greedy request needs none.
        """
        requests = len(seeds)
        greedy = greedy if greedy is not None else [False] * requests
        if all(greedy):
            return cls(*_silence(requests, slots, torch.device(device)), [], seeds, positions, still=True)
        numbers = uniforms(seeds, [counter << 12 for counter in counters], *_numbered(slots)).to(device)
        loud = [r for r in range(requests) if coupled[r] and not greedy[r]]
        return cls(*_cut(numbers, slots), loud, seeds, positions)

    @property
    def chosen(self) -> bool:
        """Whether the committed token of every row is a choice made by the noise (or needs none): no request draws."""
        return self.still or len(self.coupled) == len(self.seeds)

    def select(self, rows: Sequence[int]) -> RoundNoise:
        """The noise of some requests only, in the order given: for a draft that leaves requests out."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.final_R.device)
        row_of = {r: i for i, r in enumerate(self.coupled)}
        kept = [r for r in rows if r in row_of]
        keys, made = self._key_RK1, self._exponential_CKV
        return RoundNoise(
            self.draft_RK[index],
            self.accept_RK[index],
            self.final_R[index],
            [i for i, r in enumerate(rows) if r in row_of],
            [self.seeds[r] for r in rows],
            [self.positions[r] for r in rows],
            still=self.still,
            _key_RK1=keys if keys is None else keys[index],
            _exponential_CKV=made if made is None else made[[row_of[r] for r in kept]],
        )

    def no_draft(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The tokens and laws of a round without drafts, [R, 0] and [R, 0, V]."""
        return _no_draft(len(self.seeds), vocabulary, self.final_R.device)

    @property
    def keys(self) -> Tensor | None:
        """What fixes the exponentials of each slot, int64 [R, K+1], 0 for requests that draw; None if all do."""
        if self._key_RK1 is None and self.coupled:
            width = self.draft_RK.shape[1] + 1
            self._key_RK1 = race_keys(self.seeds, self.positions, self.coupled, width).to(self.final_R.device)
        return self._key_RK1

    def exponential(self, vocabulary: int) -> Tensor:
        """The coupled requests' exponentials [C, K+1, V]: slot k belongs to output position + k. Made once."""
        if self._exponential_CKV is None:
            keys = self.keys
            assert keys is not None, "nobody here is under the coupled rule"
            noise_BV = exponentials(keys[list(self.coupled)].flatten(), vocabulary)
            self._exponential_CKV = noise_BV.view(len(self.coupled), -1, vocabulary)
        return self._exponential_CKV

    def pick(self, probability_RV: Tensor, slot: int) -> Tensor:
        """One draft token per request for `slot`, each by its own rule: int64 [R]."""
        requests, vocabulary = probability_RV.shape
        if self.still:
            return argmax(probability_RV)  # what `draw` finds in a one-hot, in half the time
        if len(self.coupled) == requests:
            return race(probability_RV, self.exponential(vocabulary)[:, slot])
        token_R = draw(probability_RV, self.draft_RK[:, slot])
        if self.coupled:
            rows = torch.tensor(self.coupled, device=token_R.device)
            token_R[rows] = race(probability_RV[rows], self.exponential(vocabulary)[:, slot])
        return token_R


@functools.lru_cache(maxsize=256)
def _silence(requests: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What nobody reads, made once: half of everything."""
    return _cut(torch.full((requests, 2 * slots + 1), 0.5, dtype=torch.float64, device=device), slots)


@functools.lru_cache(maxsize=256)
def _no_draft(requests: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nothing, made once."""
    none_R0 = torch.zeros(requests, 0, dtype=torch.int64, device=device)
    return none_R0, torch.zeros(requests, 0, vocabulary, device=device)


def _cut(uniforms: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draft [R, K], accept [R, K] and final [R] numbers of [R, 2K+1]."""
    return uniforms[:, :slots], uniforms[:, slots : 2 * slots], uniforms[:, 2 * slots]


@functools.lru_cache(maxsize=256)
def _numbered(slots: int) -> tuple[list[int], list[int]]:
    """Offsets and streams of a request's draft, accept and final numbers, side by side."""
    assert slots <= MAX_SLOTS
    order = list(range(slots))
    return [*order, *order, 0], [DRAFT] * slots + [ACCEPT] * slots + [RESIDUAL]
