"""A language small enough to enumerate: an order-1 target and one drafter of each kind, in float64.

R requests, K block slots, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft, TokenSampler

V = 4
PROMPT = [2, 0]
_random = torch.Generator().manual_seed(7)


def _table(*size: int) -> Tensor:
    return torch.randn(*size, generator=_random, dtype=torch.float64) * 1.3


TARGET_VV = _table(V, V)
PLANNER_NAMES = ("none", "full", "fixed:1", "threshold:0.6")


def target_logits(tokens: Sequence[int]) -> Tensor:
    """The target's logits after `tokens`; only the last one matters."""
    return TARGET_VV[tokens[-1]]


class ToyDrafter:
    """Logits for slot k from the committed tokens and the earlier drafts; confidence from the same, never from x_k."""

    def __init__(self) -> None:
        self.confidence_KV = torch.rand(8, V, generator=_random, dtype=torch.float64)

    def logits(self, committed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def confidence(self, committed: Sequence[int], drafted: Sequence[int]) -> float:
        return float(self.confidence_KV[len(drafted), [*committed, *drafted][-1]])

    def propose(self, committed: Sequence[Sequence[int]], sampler: TokenSampler, slots: int) -> Draft:
        drafted: list[list[int]] = [[] for _ in committed]
        laws, confidence = [], []
        for slot in range(slots):
            both = list(zip(committed, drafted, strict=True))
            token_R, law_RV = sampler.draw(torch.stack([self.logits(c, d) for c, d in both]), slot)
            confidence.append([self.confidence(c, d) for c, d in both])
            laws.append(law_RV)
            drafted = [[*d, token] for d, token in zip(drafted, token_R.tolist(), strict=True)]
        confidence_RK = torch.tensor(confidence, dtype=torch.float64).T
        return Draft(torch.tensor(drafted), torch.stack(laws, 1), confidence_RK, [slots] * len(committed))


class MarkovDrafter(ToyDrafter):
    """As DSpark: base logits of the block's slot plus a bias from the token before."""

    base_KVV, bias_VV = _table(8, V, V), _table(V, V)

    def logits(self, committed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        return self.base_KVV[len(drafted), committed[-1]] + self.bias_VV[[*committed, *drafted][-1]]


class ParallelDrafter(ToyDrafter):
    """As DFlash: every slot on its own."""

    base_KVV = _table(8, V, V)

    def logits(self, committed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        return self.base_KVV[len(drafted), committed[-1]]


class ModelDrafter(ToyDrafter):
    """As a small language model: a blurred target, and one token that it never proposes."""

    model_VV = TARGET_VV + 0.5 * _table(V, V)

    def logits(self, committed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        logits_V = self.model_VV[[*committed, *drafted][-1]].clone()
        logits_V[([*committed, *drafted][-1] + 1) % V] = -math.inf
        return logits_V


class LookupDrafter(ToyDrafter):
    """As n-gram lookup: certain of one continuation, found in the committed tokens, not drawn by the sampler."""

    def logits(self, committed: Sequence[int], drafted: Sequence[int]) -> Tensor:
        return (
            torch.zeros(V, dtype=torch.float64).log().index_fill(0, torch.tensor(self._guess(committed, drafted)), 0.0)
        )

    def propose(self, committed: Sequence[Sequence[int]], sampler: TokenSampler, slots: int) -> Draft:
        token_RK = torch.empty(len(committed), slots, dtype=torch.int64)
        confidence_RK = torch.empty(len(committed), slots, dtype=torch.float64)
        for r, tokens in enumerate(committed):
            for k in range(slots):
                drafted = token_RK[r, :k].tolist()
                token_RK[r, k] = self._guess(tokens, drafted)
                confidence_RK[r, k] = self.confidence(tokens, drafted)
        law_RKV = torch.nn.functional.one_hot(token_RK, V).double()
        found_R = [min(slots, 1 + tokens[-1] % 2) for tokens in committed]  # shorter than asked, sometimes
        return Draft(token_RK, law_RKV, confidence_RK, found_R)

    @staticmethod
    def _guess(committed: Sequence[int], drafted: Sequence[int]) -> int:
        return (committed[-1] + 2 * len(drafted) + 1) % V


DRAFTERS: dict[str, ToyDrafter | None] = {
    "markov": MarkovDrafter(),
    "parallel": ParallelDrafter(),
    "model": ModelDrafter(),
    "lookup": LookupDrafter(),
    "none": None,
}


def plain_law(logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Sampling parameters by their definitions, one float at a time: what `shape` must give."""
    x = [float(v) for v in logits_V]
    for v in range(len(x)):
        if v in prompt or v in output:
            x[v] = x[v] / params.repetition_penalty if x[v] > 0 else x[v] * params.repetition_penalty
        x[v] -= params.frequency_penalty * output.count(v) + params.presence_penalty * (v in output)
        x[v] += (params.logit_bias or {}).get(v, 0.0)
    if params.temperature == 0:
        return [float(v == x.index(max(x))) for v in range(len(x))]
    weight = [math.exp((value - max(x)) / params.temperature) for value in x]
    kept = sorted(range(len(x)), key=lambda v: -weight[v])
    kept = kept[: params.top_k or None]
    if params.top_p < 1:
        mass, nucleus = 0.0, []
        for v in kept:
            if mass < params.top_p * math.fsum(weight[w] for w in kept):
                nucleus.append(v)
            mass += weight[v]
        kept = nucleus
    kept = [v for v in kept if weight[v] >= params.min_p * max(weight)]
    total = math.fsum(weight[v] for v in kept)
    return [weight[v] / total if v in kept else 0.0 for v in range(len(x))]
