"""What a load test asks for: an endless stream of requests, the same for every policy, of prompts of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft, DraftContext, Drafter

CODE, NOISE = "code", "noise"  # the kinds of request: a beginning of a real text, and random tokens
KINDS = (CODE, NOISE)


@dataclass(frozen=True)
class LoadRequest:
    """One request of a load test."""

    kind: str
    prompt: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class Workload:
    """Draws requests: `noise` of them random tokens, the others from `prompts`, all with lengths from these ranges."""

    prompts: Sequence[Sequence[int]]
    vocabulary: int
    prompt_tokens: tuple[int, int] = (32, 96)
    new_tokens: tuple[int, int] = (32, 96)
    noise: float = 0.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise UserError(f"{name} {low}:{high} is no range; pass LOW:HIGH with 1 <= LOW <= HIGH")
        if not 0.0 <= self.noise <= 1.0:
            raise UserError(f"noise {self.noise} is no share from 0 to 1; pass 0.5 for half of the requests")
        if not self.prompts and self.noise < 1:
            raise UserError("the workload has no prompts; pass some, or --noise 1")

    def stream(self, round: int = 0) -> Iterator[LoadRequest]:
        """The requests of one round, without end; the same every time it is called."""
        random = np.random.default_rng([self.seed, round])
        number = 0
        while True:
            yield self._request(random, self._kind(number))
            number += 1

    def users(self, count: int, round: int = 0) -> list[Iterator[LoadRequest]]:
        """Streams of so many users, each of whom keeps to one kind of request; the same every time."""

        def own(user: int) -> Iterator[LoadRequest]:
            random = np.random.default_rng([self.seed, round, user])
            while True:
                yield self._request(random, self._kind(user))

        return [own(user) for user in range(count)]

    def _kind(self, number: int) -> str:
        """Kinds come in turn, not by chance: a short slice then has its share of each."""
        return NOISE if int((number + 1) * self.noise) > int(number * self.noise) else CODE

    def _request(self, random: np.random.Generator, kind: str) -> LoadRequest:
        length = int(random.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1))
        new = int(random.integers(self.new_tokens[0], self.new_tokens[1] + 1))
        prompt = random.integers(self.vocabulary, size=length).tolist()
        if kind == CODE:
            prompt = self._piece(random, length)
        return LoadRequest(kind, prompt, self._params(kind, new, int(random.integers(2**31))))

    def _piece(self, random: np.random.Generator, length: int) -> list[int]:
        text = self.prompts[int(random.integers(len(self.prompts)))]
        start = int(random.integers(max(len(text) - length, 0) + 1))
        return list(text[start : start + length])

    def _params(self, kind: str, new: int, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=new,
            temperature=self.temperature,
            seed=seed,
            acceptance="rejection",
            ignore_eos=True,
            speculation_group=kind,
        )


class Blinded:
    """A drafter whose tokens for chosen requests are noise, with the confidences it had in its own.

    A model goes on after random tokens with text of its own, which a drafter guesses well; this makes text that no
    drafter can guess. The law says what was drawn, so the output stays the target's.
    """

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.requests: set[int] = set()
        self.generator = torch.Generator().manual_seed(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self, context: DraftContext) -> Draft:
        """The drafter's own block, but for the chosen requests' tokens and laws."""
        draft = self.drafter.propose(context)
        rows = [row for row, request in enumerate(context.request_ids) if request in self.requests]
        if not rows:
            return draft
        shape = (len(rows), draft.token_RK.shape[1])
        noise = torch.randint(draft.probability_RKV.shape[2], shape, generator=self.generator)
        token_RK, law_RKV = draft.token_RK.clone(), draft.probability_RKV.clone()
        token_RK[rows] = noise.to(token_RK.device)
        law_RKV[rows] = torch.nn.functional.one_hot(noise, law_RKV.shape[2]).to(law_RKV)
        return replace(draft, token_RK=token_RK, probability_RKV=law_RKV)
