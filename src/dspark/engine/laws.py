"""How the requests of a step sample: their shaping as tensors, remembered as long as they stay together, and noise.

B rows, R requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspark.drafters.base import Draft
from dspark.engine.request import Request
from dspark.ops.history import Counted, History
from dspark.ops.sampling import Shaping, adjust, shape
from dspark.speculation.grammar import Guide
from dspark.speculation.noise import RoundNoise

REMEMBERED = 32


@dataclass(frozen=True)
class Group:
    """Requests that share a step, in order."""

    shaping: Shaping
    seeds: list[int]
    coupled: list[bool]
    greedy: list[bool]
    guided: bool = False  # whether any of them has a grammar

    @staticmethod
    def of(requests: Sequence[Request], device: torch.device) -> Group:
        """Reads the parameters of `requests` once."""
        params = [request.params for request in requests]
        return Group(
            Shaping.of(params, device),
            [request.seed for request in requests],
            [p.coupled for p in params],
            [p.temperature == 0 for p in params],
            any(request.matcher is not None for request in requests),
        )


class Laws:
    """Shaping, noise and history of any group of an engine's requests."""

    def __init__(self, vocabulary: int, device: torch.device):
        self.vocabulary = vocabulary
        self.device = device
        self._groups: dict[tuple[int, ...], Group] = {}
        self._counted: WeakKeyDictionary[Request, Counted] = WeakKeyDictionary()  # of requests with penalties

    def group(self, requests: Sequence[Request]) -> Group:
        """How these requests sample, in this order."""
        key = tuple(request.id for request in requests)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= REMEMBERED:
                self._groups.clear()
            group = self._groups[key] = Group.of(requests, self.device)
        return group

    def noise(self, requests: Sequence[Request], slots: int) -> RoundNoise:
        """The round's randomness: a function of seed, round and position alone, so preemption does not touch it."""
        group = self.group(requests)
        return RoundNoise.of(
            group.seeds,
            [request.rounds for request in requests],
            [request.output_length for request in requests],
            group.coupled,
            slots=slots,
            greedy=group.greedy,
            device=self.device,
        )

    def history(self, requests: Sequence[Request]) -> History | None:
        """Token counts before each anchor's successor, if any request's penalties need them."""
        if not self.group(requests).shaping.penalized:
            return None
        return Counted.together([self._counts(request) for request in requests])

    def _counts(self, request: Request) -> Counted:
        counts = self._counted.get(request)
        if counts is None:
            prompt = request.tokens[: request.prompt_length]
            counts = self._counted[request] = Counted(prompt, self.vocabulary, self.device)
        if counts.counted < request.output_length:
            counts.follow(request.tokens[request.prompt_length + counts.counted :])
        return counts

    def guide(self, requests: Sequence[Request]) -> Guide | None:
        """A round's view of the requests' grammars; None if none of them has one."""
        return Guide([request.matcher for request in requests]) if self.group(requests).guided else None

    def target(
        self, requests: Sequence[Request], logits_BV: Tensor, draft: Draft | None, plan: Sequence[int]
    ) -> Tensor:
        """The law of the next token at every row, [B, V]: what the text must follow."""
        return shape(logits_BV, *self._rows(requests, draft, plan))

    def adjusted(
        self, requests: Sequence[Request], logits_BV: Tensor, draft: Draft | None, plan: Sequence[int]
    ) -> Tensor:
        """The logits [B, V] after penalties and biases, which no kernel knows."""
        if not self.group(requests).shaping.adjusts:
            return logits_BV
        return adjust(logits_BV, *self._rows(requests, draft, plan))

    def _rows(
        self, requests: Sequence[Request], draft: Draft | None, plan: Sequence[int]
    ) -> tuple[Shaping, History | None]:
        """Shaping and history of every row."""
        history = self.history(requests)
        if history is not None:
            history = history.rows(plan, draft.token_RK if draft is not None else None)
        return self.group(requests).shaping.repeat(tuple(1 + length for length in plan)), history


def padded(draft: Draft, requests: int) -> Draft:
    """The draft with empty rows for the requests behind its own, which did not draft."""
    more = requests - len(draft.token_RK)
    if not more:
        return draft
    tensors = (draft.token_RK, draft.probability_RKV, draft.confidence_RK, draft.feature_RKF)
    token, probability, confidence, feature = (
        x if x is None else torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for x in tensors
    )
    assert token is not None and probability is not None and confidence is not None
    return Draft(token, probability, confidence, [*draft.length_R, *[0] * more], feature)
